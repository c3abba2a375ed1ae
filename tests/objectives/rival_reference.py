"""Plain, slow references of the rivals: the formulas in the docstrings of `pretrain.objectives`, position by position
and pair by pair, in Python loops. They share no arithmetic with `pretrain`."""

from __future__ import annotations

import math

import torch
from reference import block, log_probabilities, part, residual_stream, rms_norm, trunk
from torch import Tensor

from pretrain.config import Config
from pretrain.model import PretrainingModel
from pretrain.objectives import TokenBatch

Leaves = dict[str, Tensor]


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() / len(terms) if terms else torch.zeros((), dtype=torch.float64)


def ahead(batch: TokenBatch, b: int, t: int, k: int) -> bool:
    """Does predicting x_{t+1+k} from position t count?"""
    documents, target = batch.document_ids[b].tolist(), t + 1 + k
    if target >= len(documents) or not batch.target_mask[b, target]:
        return False
    return all(documents[t + i] == documents[t] for i in range(k + 1))


def named(next_token: Tensor, further: list[Tensor], name: str, weight: float) -> dict[str, Tensor]:
    average = torch.stack(further).sum() / len(further)
    losses = {"loss": next_token + weight * average, "loss_next_token": next_token, name: average}
    if len(further) > 1:
        losses |= {f"{name}_{k + 1}": term for k, term in enumerate(further)}
    return losses


def mtp(leaves: Leaves, config: Config, batch: TokenBatch) -> dict[str, Tensor]:
    hidden, embeddings = trunk(part(leaves, "trunk."), config, batch)
    before = residual_stream(part(leaves, "trunk."), config, embeddings, batch, config.model.layers - 1)
    streams = [hidden]
    for k in range(config.objective.horizon):
        own = part(leaves, f"objective.heads.{k}.")
        as_layer = {f"layers.0.{name}": value for name, value in part(own, "block.").items()}
        stream = residual_stream(as_layer, config, before, batch, 1)
        streams.append(rms_norm(stream, own["norm.weight"], config.model.norm_epsilon))
    rows, length = hidden.shape[:2]
    terms = [
        mean(
            [
                -log_probabilities(stream[b, t], head_of(leaves))[batch.tokens[b, t + 1 + k]]
                for b in range(rows)
                for t in range(length)
                if ahead(batch, b, t, k)
            ]
        )
        for k, stream in enumerate(streams)
    ]
    return named(terms[0], terms[1:], "loss_multi_token", config.objective.multi_token_weight)


def fetch(p: Leaves, config: Config, hidden: Tensor, embeddings: list[Tensor]) -> Tensor:
    """What the head reads at the last slot of those given, for one position."""
    heads, width = min(4, config.model.heads), len(hidden)
    c = width // heads
    slots = []
    for e in embeddings:
        x = e + p["gamma"] * hidden
        x = x - x.sum() / width
        x = x / torch.sqrt((x * x).sum() / width + 1e-5)
        slots.append(x * p["combine_norm.weight"] + p["combine_norm.bias"])
    last = len(slots) - 1
    mixed = []
    for head in range(heads):
        mine = slice(head * c, (head + 1) * c)
        query, key, value = (p["qkv.weight"][i * width : (i + 1) * width][mine] for i in range(3))
        q = query @ slots[last]
        scores = [(key @ x) @ q / math.sqrt(c) + p["slot_bias"][head, last, j] for j, x in enumerate(slots)]
        weights = torch.softmax(torch.stack(scores), 0)
        mixed.append(sum(w * (value @ x) for w, x in zip(weights, slots, strict=True)))
    y = p["output.weight"] @ torch.cat(mixed)
    return rms_norm(y if last == 0 else y + hidden, p["norm.weight"], config.model.norm_epsilon)


def jtp(leaves: Leaves, config: Config, batch: TokenBatch) -> dict[str, Tensor]:
    hidden, embeddings = trunk(part(leaves, "trunk."), config, batch)
    own = part(leaves, "objective.fetch.")
    rows, length = hidden.shape[:2]
    terms = []
    for k in range(config.objective.horizon + 1):
        losses = []
        for b in range(rows):
            for t in range(length):
                if ahead(batch, b, t, k):
                    consumed = [embeddings[b, t + i] for i in range(k + 1)]
                    state = fetch(own, config, hidden[b, t], consumed)
                    losses.append(-log_probabilities(state, head_of(leaves))[batch.tokens[b, t + 1 + k]])
        terms.append(mean(losses))
    return named(terms[0], terms[1:], "loss_joint_token", config.objective.joint_token_weight)


def all_pairs(batch: TokenBatch) -> list[tuple[int, int, int]]:
    """Every (row, t, s) by trying every prefix with every suffix."""
    found = []
    for b in range(len(batch.tokens)):
        documents, tokens = batch.document_ids[b].tolist(), batch.tokens[b].tolist()
        is_target, length = batch.target_mask[b].tolist(), len(documents) - 1
        for t in range(length):
            for s in range(t + 1, length):
                between = all(documents[i] == documents[t] for i in range(t, s))
                closes = documents[s] != documents[t] and tokens[s] == 0 and is_target[s]
                if between and (documents[s] == documents[t] or closes) and is_target[t + 1]:
                    found.append((b, t, s))
    return found


def suffix_states(leaves: Leaves, config: Config, embeddings: Tensor, batch: TokenBatch) -> dict[tuple, Tensor]:
    """(row, document, s) to the backward state of x_s … to that document's end, its EOS included if the row has it."""
    states = {}
    own = part(leaves, "objective.backward_encoder.")
    for b, row in enumerate(batch.document_ids[:, :-1].tolist()):
        for document in dict.fromkeys(row):
            places = [t for t, other in enumerate(row) if other == document]
            after = places[-1] + 1
            if after < len(row) and batch.tokens[b, after] == 0 and batch.target_mask[b, after]:
                places.append(after)
            x = torch.stack([embeddings[b, t] for t in reversed(places)])
            for layer in range(config.model.layers):
                x = block(part(own, f"layers.{layer}."), config, x)
            for s, state in zip(reversed(places), x, strict=True):
                states[b, document, s] = rms_norm(state, own["norm.weight"], config.model.norm_epsilon)
    return states


def pair_states(leaves: Leaves, config: Config, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """What the head reads for the next and for the previous token of one pair."""
    own = part(leaves, "objective.pair_head.")
    z = torch.cat([prefix, suffix])
    gate = own["gate"] @ z
    z = z + own["down"] @ (gate * torch.sigmoid(gate) * (own["up"] @ z))
    z = rms_norm(z, own["norm"], config.model.norm_epsilon)
    return z[: len(prefix)], z[len(prefix) :]


def bst(leaves: Leaves, config: Config, batch: TokenBatch, pairs: list | None = None) -> dict[str, Tensor]:
    hidden, embeddings = trunk(part(leaves, "trunk."), config, batch)
    backward = suffix_states(leaves, config, embeddings, batch)
    next_token, previous_token = [], []
    for b, t, s in all_pairs(batch) if pairs is None else pairs:
        document = int(batch.document_ids[b, t])
        n, p = pair_states(leaves, config, hidden[b, t], backward[b, document, s])
        next_token.append(-log_probabilities(n, head_of(leaves))[batch.tokens[b, t + 1]])
        previous_token.append(-log_probabilities(p, head_of(leaves))[batch.tokens[b, s - 1]])
    a, b = mean(next_token), mean(previous_token)
    return {"loss": (a + b) / 2, "loss_next_token": a, "loss_previous_token": b}


def head_of(leaves: Leaves) -> Tensor:
    return leaves.get("lm_head.weight", leaves["trunk.embed_tokens.weight"])


def leaves_of(model: PretrainingModel) -> Leaves:
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def losses_and_gradients(model: PretrainingModel, config: Config, batch: TokenBatch, **given) -> tuple[Leaves, Leaves]:
    """The reference on a copy of the model's parameters in float64, with the gradient of every one."""
    leaves = leaves_of(model)
    losses = {"mtp": mtp, "jtp": jtp, "bst": bst}[config.objective.name](leaves, config, batch, **given)
    losses["loss"].backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in losses.items()}, gradients
