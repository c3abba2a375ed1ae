"""Prints, for horizons 1 and 8, how often each of p_psi's weights is gathered in one training step under ZeRO-3."""

import json
import sys
from collections import Counter

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pretrain import distributed
from pretrain.config import load_config
from pretrain.distributed import leave
from pretrain.engine import build_engine
from pretrain.objectives import TokenBatch
from pretrain.run_data import open_data


def count_gathers(engine: DeepSpeedEngine) -> Counter[str]:
    """Counts, from now on, how often each weight of the objective is gathered."""
    counts: Counter[str] = Counter()
    names = {p.ds_id: name for name, p in engine.module.objective.named_parameters()}
    for parameter in engine.module.parameters():

        def counting(parameters, *arguments, original=parameter.all_gather_coalesced, **options):
            counts.update(names[p.ds_id] for p in parameters if p.ds_id in names)
            return original(parameters, *arguments, **options)

        parameter.all_gather_coalesced = counting
    return counts


if __name__ == "__main__":
    ranks, device = distributed.start(5)
    found = []
    for horizon in (1, 8):
        config = load_config(sys.argv[-1], [f"objective.horizon={horizon}"])
        _, stream, vocab_size = open_data(config)
        engine = build_engine(config, vocab_size, ranks.world, device)
        counts = count_gathers(engine)
        batch = TokenBatch.from_numpy(stream.batch(0, ranks.rank, ranks.world), device)
        losses = engine(batch, engine.module.objective.valid_counts(batch))
        forward = dict(counts)
        engine.backward(losses["loss"])
        found.append({"forward": forward, "both": dict(counts)})
    if ranks.is_first:
        print("gathers", json.dumps(found), flush=True)
    dist.destroy_process_group()
    leave(0)
