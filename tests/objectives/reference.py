"""A plain, slow reference of the trunk and of the NextLat objective: the formulas of arXiv 2511.05963,
position by position, in Python loops, on scalars and vectors. It shares no arithmetic with `pretrain`.

Notation of the paper, counted from 0: inputs x_0..x_{T-1} give h_0..h_{T-1}; x_T is a label only.

    ĥ_{t,1} = p(h_t, x_{t+1}),   ĥ_{t,i} = p(ĥ_{t,i-1}, x_{t+i}),   landing on s = t+i <= T-1
    next token   valid at t     where x_{t+1} is a target
    next latent  valid at (t,s) where x_t .. x_s lie in one document (so none but x_t may open one)
    KL           valid at (t,s) where next latent is, and x_{s+1} is a target
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.model import PretrainingModel
from pretrain.objectives import TokenBatch

PSI_EPSILON = 1e-5


@dataclass
class Losses:
    """Means over the global batch; the last two have one entry per rollout step."""

    loss: Tensor
    next_token: Tensor
    next_latent_steps: list[Tensor]
    kl_steps: list[Tensor]
    next_token_count: int
    next_latent_counts: list[int]
    kl_counts: list[int]

    def named(self) -> dict[str, Tensor]:
        d = len(self.kl_steps)
        values = {
            "loss": self.loss,
            "loss_next_token": self.next_token,
            "loss_next_latent": torch.stack(self.next_latent_steps).sum() / d,
            "loss_kl": torch.stack(self.kl_steps).sum() / d,
        }
        if d > 1:
            for i in range(d):
                values[f"loss_next_latent_{i + 1}"] = self.next_latent_steps[i]
                values[f"loss_kl_{i + 1}"] = self.kl_steps[i]
        return {name: value.detach() for name, value in values.items()}


def make_batch(
    rows: Sequence[Sequence[int]],
    columns: int,
    vocab_size: int,
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> TokenBatch:
    """Rows of documents, given by their lengths, filled up with padding to `columns` = T + 1.

    prompts: for each document, how many tokens after its first are no targets.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (len(rows), columns), generator=generator)
    documents = torch.full((len(rows), columns), -1)
    positions = torch.zeros(len(rows), columns, dtype=torch.long)
    targets = torch.zeros(len(rows), columns, dtype=torch.bool)
    for b, lengths in enumerate(rows):
        column = 0
        for k, length in enumerate(lengths):
            prompt = prompts[b][k] if prompts else 0
            for offset in range(length):
                if offset == 0:
                    tokens[b, column] = 0  # EOS opens the document
                documents[b, column] = k
                positions[b, column] = offset
                targets[b, column] = offset == 0 or offset > prompt
                column += 1
        assert column <= columns
    return TokenBatch(tokens, documents, positions, targets)


def rows_of(batch: TokenBatch, rows: slice) -> TokenBatch:
    return TokenBatch(batch.tokens[rows], batch.document_ids[rows], batch.positions[rows], batch.target_mask[rows])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + epsilon) * weight


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def log_probabilities(state: Tensor, head: Tensor) -> Tensor:
    logits = head @ state
    return logits - torch.logsumexp(logits, 0)


def smooth_l1(target: Tensor, prediction: Tensor) -> Tensor:
    total = torch.zeros((), dtype=prediction.dtype)
    for error in prediction - target:
        size = error.abs()
        total = total + (0.5 * error * error if size.item() < 1.0 else size - 0.5)
    return total / len(prediction)


def mean_square(target: Tensor, prediction: Tensor) -> Tensor:
    return ((prediction - target) ** 2).sum() / len(prediction)


def p_psi(parameters: dict[str, Tensor], state: Tensor, embedding: Tensor) -> Tensor:
    x = rms_norm(torch.cat([embedding, state]), parameters["norm.weight"], PSI_EPSILON)
    x = gelu(parameters["input.weight"] @ x)
    x = gelu(parameters["hidden.weight"] @ x)
    return state + parameters["output.weight"] @ x


def nextlat(
    hidden: Tensor,
    embeddings: Tensor,
    head: Tensor,
    psi: dict[str, Tensor],
    batch: TokenBatch,
    horizon: int,
    next_latent_weight: float,
    kl_weight: float,
    stop_gradients: bool = True,
    latent_loss: str = "smooth_l1",
    rollout_loss: str = "kl",
    stop_gradient_target: bool = True,
    stop_gradient_head: bool = True,
    kl_factors: Tensor | None = None,
) -> Losses:
    """The objective over a whole global batch. `stop_gradients=False`: a wrong variant, for contrast.

    kl_factors: (B, T), each KL term is multiplied by its landing's.
    """
    rows, length = hidden.shape[:2]
    tokens, documents = batch.tokens.tolist(), batch.document_ids.tolist()
    is_target = batch.target_mask.tolist()
    frozen = (lambda x: x.detach()) if stop_gradients else (lambda x: x)

    next_token: list[Tensor] = []
    next_latent: list[list[Tensor]] = [[] for _ in range(horizon)]
    kl: list[list[Tensor]] = [[] for _ in range(horizon)]
    for b in range(rows):
        for t in range(length):
            if is_target[b][t + 1]:
                next_token.append(-log_probabilities(hidden[b, t], head)[tokens[b][t + 1]])
            state = hidden[b, t]
            for i in range(1, horizon + 1):
                s = t + i
                if s > length - 1:
                    break
                state = p_psi(psi, state, embeddings[b, s])
                path = documents[b][t : s + 1]
                if any(document != path[0] or document < 0 for document in path):
                    continue
                target = frozen(hidden[b, s]) if stop_gradient_target else hidden[b, s]
                distance = smooth_l1 if latent_loss == "smooth_l1" else mean_square
                next_latent[i - 1].append(distance(target, state))
                if is_target[b][s + 1]:
                    teacher = log_probabilities(frozen(hidden[b, s]), frozen(head))
                    student = log_probabilities(state, frozen(head) if stop_gradient_head else head)
                    if rollout_loss == "kl":
                        term = (teacher.exp() * (teacher - student)).sum()
                    else:
                        term = -student[tokens[b][s + 1]]
                    kl[i - 1].append(term if kl_factors is None else kl_factors[b, s] * term)

    def mean(terms: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=hidden.dtype)
        for term in terms:
            total = total + term
        return total / max(1, len(terms))

    next_latent_steps, kl_steps = [mean(terms) for terms in next_latent], [mean(terms) for terms in kl]
    next_token_mean = mean(next_token)
    loss = next_token_mean
    for i in range(horizon):
        loss = loss + next_latent_weight * next_latent_steps[i] / horizon
        loss = loss + kl_weight * kl_steps[i] / horizon
    return Losses(
        loss,
        next_token_mean,
        next_latent_steps,
        kl_steps,
        len(next_token),
        [len(terms) for terms in next_latent],
        [len(terms) for terms in kl],
    )


def rotate(vector: Tensor, position: int, theta: float) -> Tensor:
    """Llama's rotary position: the pair (c, c + C/2) turns by position · theta^(-2c/C)."""
    half = len(vector) // 2
    left, right = [], []
    for c in range(half):
        angle = position * theta ** (-2.0 * c / len(vector))
        x, y = vector[c], vector[c + half]
        left.append(x * math.cos(angle) - y * math.sin(angle))
        right.append(x * math.sin(angle) + y * math.cos(angle))
    return torch.stack(left + right)


def block(p: dict[str, Tensor], config: Config, x: Tensor) -> Tensor:
    """One Llama block over the tokens of one document, (n, D)."""
    model = config.model
    heads, kv_heads, head_width = model.heads, model.kv_heads or model.heads, model.width // model.heads
    y = rms_norm(x, p["input_layernorm.weight"], model.norm_epsilon)
    mixed = []
    for head in range(heads):
        mine = slice(head * head_width, (head + 1) * head_width)
        group = head // (heads // kv_heads)
        shared = slice(group * head_width, (group + 1) * head_width)
        query = y @ p["self_attn.q_proj.weight"][mine].T
        key = y @ p["self_attn.k_proj.weight"][shared].T
        value = y @ p["self_attn.v_proj.weight"][shared].T
        keys = torch.stack([rotate(k, n, model.rope_theta) for n, k in enumerate(key)])
        seen = []
        for n in range(len(x)):
            scores = keys[: n + 1] @ rotate(query[n], n, model.rope_theta)
            seen.append(torch.softmax(scores / math.sqrt(head_width), 0) @ value[: n + 1])
        mixed.append(torch.stack(seen))
    x = x + torch.cat(mixed, -1) @ p["self_attn.o_proj.weight"].T
    y = rms_norm(x, p["post_attention_layernorm.weight"], model.norm_epsilon)
    gate = y @ p["mlp.gate_proj.weight"].T
    up = y @ p["mlp.up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ p["mlp.down_proj.weight"].T


def part(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def residual_stream(
    parameters: dict[str, Tensor], config: Config, embeddings: Tensor, batch: TokenBatch, layers: int
) -> Tensor:
    """(B, T, D) after the first `layers` blocks, each document computed on its own."""
    rows = []
    for b, row in enumerate(batch.document_ids[:, :-1].tolist()):
        stream: list[Tensor] = []
        for document in dict.fromkeys(row):
            x = torch.stack([embeddings[b, t] for t, other in enumerate(row) if other == document])
            for layer in range(layers):
                x = block(part(parameters, f"layers.{layer}."), config, x)
            stream.extend(x)
        rows.append(torch.stack(stream))
    return torch.stack(rows)


def trunk(parameters: dict[str, Tensor], config: Config, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Hidden states and embeddings of the first T tokens."""
    embeddings = parameters["embed_tokens.weight"][batch.tokens[:, :-1]]
    stream = residual_stream(parameters, config, embeddings, batch, config.model.layers)
    return rms_norm(stream, parameters["norm.weight"], config.model.norm_epsilon), embeddings


def losses_and_gradients(
    model: PretrainingModel, config: Config, batch: TokenBatch, stop_gradients: bool = True
) -> tuple[Losses, dict[str, Tensor]]:
    """The reference on a copy of the model's parameters in float64, with the gradient of every one."""
    leaves = {
        name: parameter.detach().double().clone().requires_grad_() for name, parameter in model.named_parameters()
    }

    hidden, embeddings = trunk(part(leaves, "trunk."), config, batch)
    objective = config.objective
    losses = nextlat(
        hidden,
        embeddings,
        leaves.get("lm_head.weight", leaves["trunk.embed_tokens.weight"]),
        part(leaves, "objective.dynamics."),
        batch,
        objective.horizon,
        objective.next_latent_weight,
        objective.kl_weight,
        stop_gradients,
    )
    losses.loss.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return losses, gradients
