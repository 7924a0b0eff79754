"""The recursive model: a small stack of blocks, run again and again on two latent states.

    x = sqrt(D) * embedding                       one supervision step:
                                                  H_cycles times:
    z_L <- stack(z_L + z_H + x)   thinks              L_cycles times z_L <- ...
    z_H <- stack(z_H + z_L)       answers             z_H <- ...
    logits = head(z_H)

Supervision steps follow one another without gradients between them; each is trained to answer as
well as it can from the state the one before left (``objectives/act.py``). Only the last cycles of a
step are kept for the backward pass.

TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871), HRM (Wang et al. 2025, arXiv:2506.21734), TRM-MLP,
the single latent and the plain transformer are all configurations of this one class:

    TRM                          defaults: one stack for both latents
    HRM                          separate_stacks=true, bp_cycles=0, H_cycles=2, L_cycles=2
    TRM-MLP                      mixer=mlp, causal=false
    HRM-Text                     separate_stacks=true, pre_norm=true, attention_gate=true,
                                 inject_input=false, halt_max_steps=1, bp_cycles=H_cycles
    HRM's learning of halting    q_continue=true
    single latent                single_z=true
    plain transformer            single_z=true, H_cycles=1, L_cycles=1, halt_max_steps=1
      of the same parameters       and num_hidden_layers as it is
      of the same computation      and num_hidden_layers = blocks_per_step of the other

Shapes: B batch, T tokens, P positions of the puzzle's embedding before them, S = P + T, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thimble.errors import ConfigError
from thimble.models.attention import Attention, KVCache
from thimble.models.causal_lm import LayerState, documents_for
from thimble.models.layers import Linear, SwiGLU, plain_norm, rotary_rows, rotary_table
from thimble.models.retention import Retention

if TYPE_CHECKING:
    from thimble.config.model import ModelConfig

# (z_H, z_L) or, with single_z, (z,): [B, S, D] each. The first is what is answered from.
Latents = tuple[Tensor, ...]

# A normal distribution cut off at two standard deviations has this standard deviation.
TRUNCATED_STD = 0.87962566103423978


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with a normal distribution that ends at two of its deviations and, after that, has
    ``std`` exactly, as JAX draws it."""
    wide = std / TRUNCATED_STD
    nn.init.trunc_normal_(tensor, 0.0, wide, -2 * wide, 2 * wide, generator=generator)


def position_table(config: ModelConfig, length: int) -> Tensor:
    """What attention turns queries and keys by, [2, length, C]; by nothing without RoPE."""
    if config.position_embedding == "rope":
        return rotary_table(length, config.head_dim, config.rope_theta)
    shape = length, config.head_dim
    return torch.stack([torch.ones(shape), torch.zeros(shape)])


class SequenceMLP(nn.Module):
    """SwiGLU over the positions instead of the channels: [B, S, D] -> [B, S, D].

    It has a weight for each pair of positions, so their number is fixed, and none of them is
    hidden from the others. (MLP-Mixer, arXiv:2105.01601)
    """

    def __init__(self, positions: int, inner: int) -> None:
        super().__init__()
        self.positions = positions
        self.mlp = SwiGLU(positions, inner)

    def forward(
        self, x_bsd: Tensor, rope_2sc: Tensor, state: KVCache | None = None
    ) -> tuple[Tensor, None]:
        assert state is None, "nothing that sees the future can be cached"
        return self.mlp(x_bsd.transpose(1, 2)).transpose(1, 2), None


class RecursiveBlock(nn.Module):
    """``norm(x + mixer(x))``, then ``norm(x + mlp(x))``; the norm is RMSNorm without a scale.

    With ``pre_norm`` it is ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, and the stack's
    output is normalised. Either way the output of every call of a stack has the same size, however
    often it has been through: that is what keeps a recursion from growing or fading.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer: nn.Module
        if config.mixer == "mlp":
            self.mixer = SequenceMLP(config.num_positions, config.mlp_mixer_width)
        elif config.mixer == "retention":
            self.mixer = Retention(config)
        else:
            self.mixer = Attention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                causal=config.causal,
                gated=config.attention_gate,
            )
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.pre_norm, self.eps = config.pre_norm, config.rms_norm_eps

    def forward(
        self,
        x_bsd: Tensor,
        rope_2sc: Tensor,
        state: LayerState | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        more = () if documents is None else (documents,)  # which a mixer of positions cannot have
        if self.pre_norm:
            mixed, _ = self.mixer(plain_norm(x_bsd, self.eps), rope_2sc, state, *more)
            x_bsd = x_bsd + mixed
            return x_bsd + self.mlp(plain_norm(x_bsd, self.eps))
        mixed, _ = self.mixer(x_bsd, rope_2sc, state, *more)
        x_bsd = plain_norm(x_bsd + mixed, self.eps)
        return plain_norm(x_bsd + self.mlp(x_bsd), self.eps)


class Stack(nn.Module):
    """The blocks, one after the other, on ``z + injected``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RecursiveBlock(config) for _ in range(config.num_hidden_layers))
        self.pre_norm, self.eps = config.pre_norm, config.rms_norm_eps

    def forward(
        self,
        z_bsd: Tensor,
        injected_bsd: Tensor,
        rope_2sc: Tensor,
        caches: Sequence[LayerState] | None,
        recompute: bool,
        documents: Tensor | None = None,
    ) -> Tensor:
        z = z_bsd + injected_bsd
        for index, block in enumerate(self.blocks):
            if recompute:
                z = checkpoint(block, z, rope_2sc, None, documents, use_reentrant=False)
            else:
                z = block(z, rope_2sc, caches[index] if caches else None, documents)
        return plain_norm(z, self.eps) if self.pre_norm else z


class RecursiveLM(nn.Module):
    """embedding -> recursion -> head, and a head that says whether to stop.

    Parameters are float32; ``compute_dtype`` is what activations and products run in. With
    ``checkpoint_activations`` a block keeps only its input for the backward pass.

    ``q_head`` reads one position of z_H and gives two numbers: the first is the logit that the
    answer is right, so that one can halt; the second is HRM's value of going on. Only with
    ``q_continue`` it is trained; it is always there, so that parameters are those of the published
    models.

    ``hidden``, ``head``, ``new_state`` are ``CausalLM``'s, so sampling and evaluation take either.
    """

    rope_2sc: Tensor
    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.schedule != "recursive":
            raise ConfigError("This model's stack runs in cycles. Use:\n  model.schedule=recursive")
        self.config = config
        self.compute_dtype = torch.float32
        self.checkpoint_activations = False
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        # Few puzzles are in a batch: gradients are sparse, and training/sparse_sign.py applies them
        self.puzzle_embedding = (
            nn.Embedding(config.puzzle_identifiers, width, sparse=True)
            if config.puzzle_identifiers
            else None
        )
        self.position_embedding = (
            nn.Embedding(config.num_positions, width)
            if config.position_embedding == "learned"
            else None
        )
        self.stacks = nn.ModuleList(Stack(config) for _ in range(1 + config.separate_stacks))
        self.head = Linear(width, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.q_head = nn.Linear(width, 2)
        # Where every position begins. Drawn once and part of the weights, but never trained.
        self.register_buffer("H_init", torch.zeros(width))
        if not config.single_z:
            self.register_buffer("L_init", torch.zeros(width))
        table = position_table(config, config.num_positions)
        self.register_buffer("rope_2sc", table, persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> RecursiveLM:
        """Truncated normal weights of deviation 1/sqrt(inputs), so that maps keep the size of what
        they get; a halting head that says "go on" (bias -5) whatever it sees.

        Logits then have deviation 1 and the first loss is about ln(vocabulary) + 1/2.
        """
        for name, parameter in self.named_parameters():
            if name.startswith(("q_head", "puzzle_embedding")):
                parameter.zero_()
            elif name.startswith(("embedding", "position_embedding")):
                truncated_normal_(parameter, 1 / self.embedding_scale, generator)
            else:
                truncated_normal_(parameter, parameter.shape[1] ** -0.5, generator)
        self.q_head.bias.fill_(-5.0)
        for init in (self.H_init,) if self.config.single_z else (self.H_init, self.L_init):
            truncated_normal_(init, 1.0, generator)
        return self

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once, the embeddings of puzzles included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def embedding_scale(self) -> float:
        return self.config.embedding_scale or math.sqrt(self.config.hidden_size)

    @property
    def prefix(self) -> int:
        """Positions before the tokens."""
        return self.config.puzzle_emb_len if self.puzzle_embedding is not None else 0

    # --- the recursion

    def embed(
        self,
        ids_bt: Tensor,
        puzzles_b: Tensor | None = None,
        positions_bt: Tensor | slice = slice(None),
    ) -> Tensor:
        """Token ids [B, T], and of each row its puzzle's identifier -> x [B, S, D].

        ``positions_bt``: where they are in their rows, if not at the beginning. Raises ConfigError
        when the number of tokens is not the one an mlp mixer was made for.
        """
        config, time = self.config, ids_bt.shape[1]
        if config.mixer == "mlp" and time != config.max_position_embeddings:
            raise ConfigError(
                f"model.mixer=mlp takes exactly {config.max_position_embeddings} tokens, and these "
                f"are {time}. Use:\n  model.max_position_embeddings={time}"
            )
        x = F.embedding(ids_bt, self.embedding.weight)
        if self.puzzle_embedding is not None:
            assert puzzles_b is not None, "a model with puzzles is told which"
            # The first position holds the puzzle; the others are room to think in.
            puzzle = self.puzzle_embedding(puzzles_b)[:, None]
            x = torch.cat([F.pad(puzzle, (0, 0, 0, self.prefix - 1)), x], dim=1)
        if self.position_embedding is not None:
            places = self.position_embedding.weight[positions_bt]
            if isinstance(positions_bt, slice):
                places = places[: x.shape[1]]
            x = (x + places) * math.sqrt(0.5)  # a sum of two, of the size of one
        return (x * self.embedding_scale).to(self.compute_dtype)

    def initial_latents(self, batch: int, positions: int) -> Latents:
        """What every row begins with: the same at every position.

        Without ``inject_input`` z_H is replaced by the input as soon as the step begins.
        """
        shape = (batch, positions, self.config.hidden_size)
        inits = (self.H_init,) if self.config.single_z else (self.H_init, self.L_init)
        return tuple(init.to(self.compute_dtype).expand(shape) for init in inits)

    def supervision_step(
        self,
        z: Latents,
        x_bsd: Tensor,
        rope_2sc: Tensor | None = None,
        caches: Sequence[LayerState] | None = None,
        documents: Tensor | None = None,
    ) -> Latents:
        """All cycles once; gradients go through the last ``bp_cycles`` of them.

        ``caches`` are those of this supervision step, ``blocks_per_step`` of them. ``documents``:
        as of ``causal_lm.documents_for``.
        """
        config = self.config
        rope = self.rope_2sc[:, : x_bsd.shape[1]] if rope_2sc is None else rope_2sc
        parts = self._calls(caches)
        low, high = self.stacks[0], self.stacks[-1]
        z_H, z_L = z[0], z[-1]  # one and the same with single_z
        if not config.inject_input:
            z_H = x_bsd
        wanted = torch.is_grad_enabled()
        again = wanted and self.checkpoint_activations
        for left in range(config.H_cycles, 0, -1):
            for step in range(config.L_cycles):
                # With bp_cycles=0 the gradient goes through the last call of each stack alone.
                last_call = left == 1 and step == config.L_cycles - 1
                kept = left <= config.bp_cycles or last_call
                with torch.set_grad_enabled(wanted and kept):
                    injected = self._injected(z_H, x_bsd)
                    z_L = low(z_L, injected, rope, next(parts), again and kept, documents)
            if not config.single_z:
                kept = left <= max(config.bp_cycles, 1)
                with torch.set_grad_enabled(wanted and kept):
                    z_H = high(z_H, z_L, rope, next(parts), again and kept, documents)
        return (z_L,) if config.single_z else (z_H, z_L)

    def _injected(self, z_H: Tensor, x_bsd: Tensor) -> Tensor:
        """What an update of z_L is given beside itself."""
        if self.config.single_z:
            return x_bsd
        return z_H + x_bsd if self.config.inject_input else z_H

    def _calls(self, caches: Sequence[LayerState] | None) -> Iterator[Sequence[LayerState] | None]:
        """The caches of each call of a stack, in the order of the calls."""
        layers = self.config.num_hidden_layers
        for start in range(0, self.config.blocks_per_step, layers):
            yield caches[start : start + layers] if caches else None

    def unroll(
        self,
        ids_bt: Tensor,
        state: Sequence[LayerState] | None = None,
        *,
        steps: int | None = None,
        puzzles_b: Tensor | None = None,
        positions_bt: Tensor | None = None,
        starts_bt: Tensor | None = None,
    ) -> Iterator[Latents]:
        """The latents after each of ``steps`` supervision steps (default: halt_max_steps, or as
        many as the state was made for), each detached from the one before.

        ``positions_bt`` says where each token is in its row, if not after those of the state.
        ``starts_bt``: true where a document begins, which sees nothing of those before it.
        """
        assert starts_bt is None or not self.prefix
        documents = documents_for(self.config, starts_bt, state)
        past = state[0].length if state else 0
        places = slice(past, None) if positions_bt is None else positions_bt
        each = self.config.blocks_per_step
        if state:
            steps = len(state) // each
        x = self.embed(ids_bt, puzzles_b, places)
        if positions_bt is not None:
            rope = self.rope_2sc[:, positions_bt][:, :, None]
        elif self.config.position_embedding == "rope":
            rope = rotary_rows(self.rope_2sc, past, x.shape[1], self.config.rope_theta)
        else:  # by nothing, also beyond the context
            rope = self.rope_2sc[:, :1].expand(-1, x.shape[1], -1)
        z = self.initial_latents(x.shape[0], x.shape[1])
        for step in range(steps or self.config.halt_max_steps):
            z = tuple(latent.detach() for latent in z)
            caches = state[step * each : (step + 1) * each] if state else None
            z = self.supervision_step(z, x, rope, caches, documents)
            yield z

    def tokens(self, z: Latents) -> Tensor:
        """What the head reads: z_H [B, T, D] without the puzzle's positions."""
        return z[0][:, self.prefix :]

    def q_values(self, z: Latents, position_b: Tensor | None = None) -> Tensor:
        """float32 logits [B, 2] of halting and of going on, read at one position of each row.

        ``position_b`` counts tokens. A causal model must have it: the last token of the prompt,
        say, since the first has seen nothing yet. Without it the first position of all is read,
        which has seen everything when the model is not causal.
        """
        if position_b is None:
            if self.config.causal:
                raise ConfigError(
                    "The halting head of a causal model needs a position that has seen the prompt; "
                    "the first position has not."
                )
            read = z[0][:, 0]
        else:
            rows = torch.arange(len(position_b), device=position_b.device)
            read = z[0][rows, self.prefix + position_b]
        return self.q_head(read.to(self.q_head.weight.dtype))

    def halting_logit(self, q_b2: Tensor) -> Tensor:
        """Of ``q_values``, what is above 0 where the head would halt: [B].

        TRM halts where the answer is likelier right than wrong; with ``q_continue``, as in HRM,
        halting has to be worth more than going on.
        """
        return q_b2[:, 0] - q_b2[:, 1] if self.config.q_continue else q_b2[:, 0]

    @torch.no_grad()
    def halting_steps(
        self,
        ids_bt: Tensor,
        position_b: Tensor | None = None,
        *,
        puzzles_b: Tensor | None = None,
    ) -> Tensor:
        """After how many supervision steps the halting head would stop each row: int64 [B].

        At least 1, at most ``halt_max_steps``. An answer is best given after as many steps as
        training gave its prompt: where rows halt early, later steps are hardly trained.
        """
        config = self.config
        found = torch.full((len(ids_bt),), config.halt_max_steps, device=ids_bt.device)
        for step, z in enumerate(self.unroll(ids_bt, puzzles_b=puzzles_b), start=1):
            stops = self.halting_logit(self.q_values(z, position_b)) > 0
            found = torch.where(stops, found.clamp(max=step), found)
            if bool((found <= step).all()):
                break
        return found

    # --- as a language model

    def new_state(
        self, batch: int, capacity: int | None = None, *, steps: int | None = None
    ) -> Sequence[LayerState]:
        """Nothing seen yet, for ``batch`` sequences of ``capacity`` (default: context) positions;
        retention's states have no end.

        One cache for every block of every call of every supervision step: what a position is at
        one depth of the recursion depends only on earlier positions at smaller depths, so caches
        make no difference to the result as long as the number of ``steps`` is fixed.

        Raises ConfigError for a model that is not causal.
        """
        config = self.config
        if not config.causal:
            raise ConfigError("A model that sees the future has no cache: model.causal=false.")
        count = (steps or config.halt_max_steps) * config.blocks_per_step
        retentions = [module for module in self.modules() if isinstance(module, Retention)]
        if retentions:  # whose states all have one shape
            return [retentions[0].new_state(batch) for _ in range(count)]
        like = torch.empty(0, dtype=self.compute_dtype, device=self.embedding.weight.device)
        length = min(capacity or config.max_position_embeddings, config.max_position_embeddings)
        heads, size = config.num_key_value_heads, config.head_dim
        return [KVCache(batch, heads, length, size, like) for _ in range(count)]

    def hidden(
        self,
        ids_bt: Tensor,
        state: Sequence[LayerState] | None = None,
        *,
        steps: int | None = None,
        puzzles_b: Tensor | None = None,
        starts_bt: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> z_H [B, T, D] after the last supervision step; see ``unroll``."""
        options = {"puzzles_b": puzzles_b, "starts_bt": starts_bt}
        *_, z = self.unroll(ids_bt, state, steps=steps, **options)
        return self.tokens(z)

    def forward(
        self,
        ids_bt: Tensor,
        state: Sequence[LayerState] | None = None,
        *,
        steps: int | None = None,
        puzzles_b: Tensor | None = None,
        starts_bt: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, vocabulary]; see ``unroll``."""
        options = {"puzzles_b": puzzles_b, "starts_bt": starts_bt}
        return self.head(self.hidden(ids_bt, state, steps=steps, **options)).float()
