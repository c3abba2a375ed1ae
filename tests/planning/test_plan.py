"""What a plan says of memory, time and traffic, against the real model, a real engine and known values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from launch import launch

from data_pipeline import UserError
from pretrain.config import Config, load_config
from pretrain.model import PretrainingModel, parameter_counts
from pretrain.plan import Cluster, Plan, main, plan
from pretrain.planning.activations import ModelSizes, gpu_kernels, model_sizes
from pretrain.planning.hardware import GPUS
from pretrain.planning.memory import memory
from pretrain.planning.traffic import traffic

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = CONFIGS / "fineweb_edu_1b" / "nextlat_d2.yaml"
VOCAB = 50_257
SIZES = ModelSizes(parameters=1000, small_parameters=0, activation_bytes=0, loss_bytes=0)


def large(*overrides: str) -> Config:
    return load_config(LARGE, overrides)


def on(config: Config, nodes: int = 1, gpus: int = 8, gpu: str = "H100", mfu: float = 0.4) -> Plan:
    return plan(config, VOCAB, Cluster(nodes, gpus, GPUS[gpu], GPUS[gpu].network_gbytes_per_second), mfu)


@pytest.mark.parametrize("path", sorted(set(CONFIGS.rglob("*.yaml")) - set((CONFIGS / "deepspeed").iterdir())), ids=str)
def test_every_configs_parameters_are_those_of_its_model(path: Path) -> None:
    config = load_config(path, ["batch.micro_sequences=1", "data.sequence_length=64"])
    with torch.device("meta"):
        real = parameter_counts(PretrainingModel(config, 4096))["training"]
    assert model_sizes(config, 4096, torch.bfloat16).parameters == real


def test_an_objective_whose_sizes_depend_on_the_data_says_so() -> None:
    config = load_config(CONFIGS / "fineweb_edu_1b" / "bst.yaml")
    assert "what it keeps depends on the data" in on(config).warnings[-1]


def test_activations_grow_with_the_micro_batch_and_the_depth_alone() -> None:
    def sizes(*overrides: str) -> ModelSizes:
        return model_sizes(large("data.sequence_length=256", *overrides), VOCAB, torch.bfloat16)

    one, two = sizes("batch.micro_sequences=1"), sizes("batch.micro_sequences=2")
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.01)
    deep = sizes("batch.micro_sequences=1", "model.layers=44")
    assert deep.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.05)
    assert deep.loss_bytes == one.loss_bytes


def test_a_block_keeps_what_its_arithmetic_needs() -> None:
    """Per token, in widths D: two norms' inputs, three inputs of products, q, k, v and the output; four of the MLP."""
    config = large("batch.micro_sequences=1", "model.layers=1")
    deeper = large("batch.micro_sequences=1", "model.layers=2")
    layer = (
        model_sizes(deeper, VOCAB, torch.bfloat16).activation_bytes
        - model_sizes(config, VOCAB, torch.bfloat16).activation_bytes
    )
    D, inner, tokens = 2048, 5504, 1024
    least = 2 * tokens * (2 * D + 2 * D + 4 * D + 4 * inner)
    assert least <= layer <= 1.35 * least


def test_the_stand_ins_for_gpu_kernels_leave_torch_as_it_was() -> None:
    before = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm
    with gpu_kernels():
        assert torch.nn.functional.rms_norm is not before[1]
    assert (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm) == before


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2000, 6000, 3000), (2, 2000, 1000, 3000), (3, 500, 1000, 3000)],
)
def test_each_zero_stage_spreads_what_it_should(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    held = memory(large(f"deepspeed.zero_optimization.stage={stage}"), SIZES, 4, 2)
    assert (held.weights, held.gradients, held.optimizer) == (weights, gradients, optimizer)


@pytest.mark.parametrize("nodes", [1, 4])
def test_zero_3_holds_what_deepspeeds_own_estimate_says(nodes: int) -> None:
    """In bfloat16: 18 bytes a parameter, spread over the ranks, of which offloading leaves 2, or none, on the GPU."""
    offload = f"deepspeed=@{CONFIGS}/deepspeed/offload_cpu.yaml"
    cases = {
        (False, False): large(),
        (True, False): large(offload),
        (True, True): large(offload, "deepspeed.zero_optimization.offload_param.device=cpu"),
    }
    for (optimizer, weights), config in cases.items():
        host, gpu, of_largest_layer = estimate_zero3_model_states_mem_needs(
            1000, 0, 8, nodes, cpu_offload=optimizer, cpu_offload_params=weights, additional_buffer_factor=1
        )
        ours = memory(config, SIZES, 8 * nodes, 2)
        assert int(ours.weights + ours.gradients + ours.optimizer) == gpu
        assert of_largest_layer == 0 and (not optimizer or int(8 * ours.host) == host)


def test_offloading_moves_the_optimizer_to_where_the_config_says() -> None:
    cpu = memory(large(f"deepspeed=@{CONFIGS}/deepspeed/offload_cpu.yaml"), SIZES, 4, 2)
    assert (cpu.gradients, cpu.optimizer, cpu.host, cpu.nvme) == (0, 0, 4000, 0)
    nvme = memory(large(f"deepspeed=@{CONFIGS}/deepspeed/offload_nvme.yaml"), SIZES, 4, 2)
    assert (nvme.gradients, nvme.optimizer, nvme.host, nvme.nvme) == (0, 0, 1000, 3000)


def test_hpz_keeps_a_copy_on_each_node_and_halves_the_gathers_between_them() -> None:
    flat = large("batch.micro_sequences=4")
    hpz = large("batch.micro_sequences=4", f"deepspeed=@{CONFIGS}/deepspeed/many_nodes.yaml")
    assert memory(hpz, SIZES, 16, 2).buffers - memory(flat, SIZES, 16, 2).buffers == 2 * 1000 / 8
    steps = 512 // (16 * 4)
    assert traffic(flat, 1000, 2, 8, 2).network == steps * (2 * 2000 + 2000) / 2 / 8
    assert traffic(hpz, 1000, 2, 8, 2).network == steps * (2000 + 2000) / 2 / 8
    quantised = large(
        "batch.micro_sequences=4",
        "deepspeed.zero_optimization.zero_quantized_weights=true",
        "deepspeed.zero_optimization.zero_quantized_gradients=true",
    )
    assert traffic(quantised, 1000, 2, 8, 2).network == steps * (2 * 1000 + 500) / 2 / 8


def test_one_gpu_sends_nothing() -> None:
    alone = traffic(large("batch.micro_sequences=4"), 1000, 1, 1, 2)
    assert (alone.in_node, alone.network) == (0.0, 0.0)


def test_known_values_of_the_papers_large_run() -> None:
    result = on(large())
    assert result.parameters == 1_401_735_168 and result.steps == 190_735
    assert result.tokens_per_second == pytest.approx(8 * 989e12 * 0.4 / result.flops_per_token)
    assert result.days == pytest.approx(result.tokens / result.tokens_per_second / 86_400)
    assert result.gpu_hours == pytest.approx(24 * 8 * result.days)
    assert result.warnings == []


def test_more_gpus_hold_less_each_and_are_done_sooner() -> None:
    few, many = on(large(), 1), on(large(), 4)
    assert many.memory.gpu < few.memory.gpu and many.days < few.days
    assert many.network_bytes > few.network_bytes == 0
    assert on(large(), mfu=0.2).days == pytest.approx(2 * few.days)


def test_what_does_not_fit_is_said_with_changes_that_each_would_do() -> None:
    config = large("batch.micro_sequences=32", "deepspeed.zero_optimization.stage=1")
    result = on(config, gpu="L40S")
    (warning,) = [w for w in result.warnings if w.startswith("will not fit")]
    assert "batch.micro_sequences=" in warning
    for number in (16, 8, 4, 2, 1):
        changed = config.model_copy(update={"batch": replace_micro(config, number)})
        fits = not [w for w in on(changed, gpu="L40S").warnings if w.startswith("will not fit")]
        assert (f"batch.micro_sequences={number};" in f"{warning};") == fits


def replace_micro(config: Config, number: int) -> object:
    return config.batch.model_copy(update={"micro_sequences": number})


def test_a_network_that_sets_the_pace_is_named_with_what_helps() -> None:
    slow = Cluster(8, 8, GPUS["H100"], network_gbytes_per_second=0.5)
    (warning,) = plan(large(), VOCAB, slow).warnings
    assert "the network will set the pace" in warning and "zero_hpz_partition_size=8" in warning
    assert plan(large(), VOCAB, replace(slow, network_gbytes_per_second=50)).warnings == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H1000"], "H1000: not known; one of A100-40"),
        (["--gpu", "H100", "--nodes", "0"], "at least 1"),
        (["--gpu", "H100", "--nodes", "3"], "is not a multiple of 24 ranks"),
        (["--gpu", "H100", "data.path=/nowhere"], "or give --vocab-size"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    vocabulary = [] if "data.path=/nowhere" in arguments else ["--vocab-size", str(VOCAB)]
    with pytest.raises(UserError, match=message):
        main(["--config", str(LARGE), "--nodes", "1", "--gpus-per-node", "8", *vocabulary, *arguments])


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", str(LARGE), "--nodes=2", "--gpus-per-node=8", "--gpu=h200", f"--vocab-size={VOCAB}"]
    main([*common, "--json"])
    figures = json.loads(capsys.readouterr().out)
    main(common)
    table = capsys.readouterr().out
    assert f"{figures['parameters']:,}" in table
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "buffers"):
        assert f"{figures['memory'][part] / 2**30:.2f}" in table
    assert figures["memory"]["gpu"] == pytest.approx(sum(v for k, v in figures["memory"].items() if k != "gpu"))


def test_a_real_engine_holds_what_the_plan_says(write_config: Callable[..., Path]) -> None:
    """ZeRO-3 on two ranks, in float32, where the tensors are large enough for the padding not to matter."""
    config = load_config(path := write_config("held", {"model.width": 256, "model.layers": 3}))
    output = launch(2, str(Path(__file__).parents[1] / "multi" / "held_bytes.py"), str(path), "4096").stdout
    held = json.loads(output.split("HELD ")[1].splitlines()[0])
    planned = memory(config, replace(model_sizes(config, 4096, torch.float32), small_parameters=0), 2, 4)
    for part, size in held.items():
        assert getattr(planned, part) == pytest.approx(size, rel=0.01), part
