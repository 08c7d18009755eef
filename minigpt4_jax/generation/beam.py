"""Beam search: the most probable answers instead of the likeliest next token. Pure functions over device arrays.

`start_beams` continues `prefill` (a prompt is read once, then its cache is repeated), `beam_step` feeds the newest
token of every beam and chooses the next ones, `rank` says which answers were found. All bookkeeping is on the device in
static shapes, finished answers too, as in the beam searches of flax's examples and t5x; the caller's loop only asks
`done`.

The rules are those of transformers 4.30 (`beam_search`, `BeamSearchScorer`, `BeamHypotheses`, early stopping off),
which the original generates with and the golden sets record:

- a beam's score is the sum of its tokens' log-probabilities, the repetition penalty applied to these (greedy decoding:
  to the logits);
- every step looks at the best continuations of all beams together. One that ends is a finished answer if it is among
  the best `W`, and dropped otherwise; the best `W` that do not end are the next beams;
- the `W` best finished answers are kept, by `score / length ** length_penalty`. The length counts what the history of
  the original begins with (one stand-in token where the prompt comes as embeddings) and leaves the stop token out;
- a row is done when even its best continuation, at its length with one token more, would not be better than the worst
  of `W` finished answers; what is unfinished at the last step joins the finished ones.

It looks at `2 W` continuations in all, which is the same with the one stop token that it knows; here there may be more.
Not for: drawing tokens (beams are certain), prompts, the loop over steps (`beam_search.py`).
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.generation.decode import read_tokens
from minigpt4_jax.generation.sampling import FloatScalar, IntScalar, penalize_repetition
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params


@flax.struct.dataclass
class BeamRules:
    """What a search goes by. All of it is traced: changing a number compiles nothing."""

    stops: Bool[Array, " V"] | Bool[np.ndarray, " V"]
    """Tokens that end an answer."""
    length_penalty: FloatScalar
    """Above 0 long answers gain, 0 leaves the sums of log-probabilities as they are."""
    repetition_penalty: FloatScalar
    length_before: IntScalar
    """What the length of an answer counts before its first token: 1 in the original's generation from embeddings."""


@flax.struct.dataclass
class Answers:
    """`W` answers of each row, best first; places that no answer has taken yet have the score -inf."""

    scores: Float[Array, "B W"]
    """Sum of the log-probabilities over `length ** length_penalty`."""
    token_ids: Int[Array, "B W A"]
    """0 behind the end."""
    lengths: Int[Array, "B W"]
    """Ids of each, the stop token included if one ends it."""


@flax.struct.dataclass
class BeamState:
    """Everything a running search keeps on the device: `W` beams of each row, best first."""

    scores: Float[Array, "B W"]
    """Sums of log-probabilities; -inf for a beam that is none (before the first token, or in a tiny vocabulary)."""
    token_ids: Int[Array, "B W A"]
    """What each beam has written; the newest token is not yet fed to the model."""
    step: Int[Array, ""]
    """Tokens that every beam has written."""
    position: Int[Array, " B"]
    """Where the newest token of each beam stands."""
    seen: Bool[Array, "B W V"]
    """Tokens that the repetition penalty counts as written."""
    finished: Answers
    done: Bool[Array, " B"]
    """Rows whose answers are settled. Their beams go on, and change nothing any more."""
    caches: KVCache
    """`B * W` rows."""


def start_beams(
    logits: Float[Array, "B V"],
    caches: KVCache,
    lengths: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    rules: BeamRules,
    *,
    num_beams: int,
    places: int,
) -> BeamState:
    """The state after the first token, from what `prefill` gives: its caches may be used again.

    Args:
        lengths: tokens of each prompt.
        num_beams: the `W` of the state, at least 1.
        places: of the cache of every beam, and the most ids of an answer: prompt and answer fit together.
    """
    batch, vocab = logits.shape
    token_ids = jnp.zeros((batch, num_beams, places), jnp.int32)
    nothing = jnp.full((batch, num_beams), -jnp.inf)
    state = BeamState(
        scores=nothing.at[:, 0].set(0.0),  # all beams are the same prompt: only one counts
        token_ids=token_ids,
        step=jnp.zeros((), jnp.int32),
        position=lengths - 1,
        seen=jnp.broadcast_to(seen[:, None], (batch, num_beams, vocab)),
        finished=Answers(
            scores=nothing, token_ids=token_ids, lengths=jnp.zeros((batch, num_beams), jnp.int32)
        ),
        done=jnp.zeros(batch, bool),
        caches=jax.tree.map(
            lambda leaf: jnp.repeat(leaf, num_beams, axis=0),
            tuple(cache.resize(places) for cache in caches),
        ),
    )
    everywhere = jnp.broadcast_to(logits[:, None], (batch, num_beams, vocab))
    return _advance(state, everywhere, rules)[0]


def beam_step(params: Params, state: BeamState, rules: BeamRules, *, model: MiniGPT4) -> BeamState:
    """Feeds every beam's newest token and chooses the next beams. Donate `state`."""
    batch, num_beams = state.scores.shape
    newest = jnp.take(state.token_ids, state.step - 1, axis=2)
    logits, caches = read_tokens(
        params,
        state.caches,
        newest.reshape(-1),
        jnp.repeat(state.position, num_beams),
        places=state.caches[0].capacity,
        model=model,
    )
    following, parents = _advance(state, logits.reshape(batch, num_beams, -1), rules)
    rows = (jnp.arange(batch)[:, None] * num_beams + parents).reshape(-1)
    return dataclasses.replace(following, caches=jax.tree.map(lambda leaf: leaf[rows], caches))


def rank(state: BeamState, rules: BeamRules) -> Answers:
    """The answers of a search that ends here, best first. Unfinished ones count in rows that are not done."""
    length = (rules.length_before + state.step).astype(jnp.float32)
    running = Answers(
        scores=jnp.where(
            state.done[:, None], -jnp.inf, state.scores / length**rules.length_penalty
        ),
        token_ids=state.token_ids,
        lengths=jnp.broadcast_to(state.step, state.scores.shape),
    )
    return _keep_best(state.finished, running)


def _advance(
    state: BeamState, logits: Float[Array, "B W V"], rules: BeamRules
) -> tuple[BeamState, Int[Array, "B W"]]:
    """The state with one more token in every beam, its caches untouched, and the beam that each one continues."""
    batch, num_beams, vocab = logits.shape
    log_probs = penalize_repetition(
        jax.nn.log_softmax(logits.reshape(-1, vocab)),
        state.seen.reshape(-1, vocab),
        penalty=rules.repetition_penalty,
    )
    totals = state.scores[:, :, None] + log_probs.reshape(logits.shape)
    best, best_places = jax.lax.top_k(totals.reshape(batch, -1), num_beams)
    going_on = jnp.where(rules.stops[None, None], -jnp.inf, totals)
    scores, places = jax.lax.top_k(going_on.reshape(batch, -1), num_beams)
    parents, tokens = places // vocab, places % vocab
    finished, done = _finish(state, best, best_places, rules)
    following = dataclasses.replace(
        state,
        scores=scores,
        token_ids=_append(state, parents, tokens),
        step=state.step + 1,
        position=state.position + 1,
        seen=jnp.take_along_axis(state.seen, parents[:, :, None], axis=1)
        | jax.nn.one_hot(tokens, vocab, dtype=bool),
        finished=finished,
        done=done,
    )
    return following, parents


def _finish(
    state: BeamState, best: Float[Array, "B W"], places: Int[Array, "B W"], rules: BeamRules
) -> tuple[Answers, Bool[Array, " B"]]:
    """Finished answers with those among the best continuations that end, and which rows are done with that."""
    vocab = state.seen.shape[-1]
    parents, tokens = places // vocab, places % vocab
    length = (rules.length_before + state.step).astype(jnp.float32)
    ends = rules.stops[tokens] & ~state.done[:, None]
    ended = Answers(
        scores=jnp.where(ends, best / length**rules.length_penalty, -jnp.inf),
        token_ids=_append(state, parents, tokens),
        lengths=jnp.broadcast_to(state.step + 1, best.shape),
    )
    finished = _keep_best(state.finished, ended)
    worst = finished.scores[:, -1]
    hope = best[:, 0] / (length + 1) ** rules.length_penalty
    return finished, state.done | ((worst > -jnp.inf) & (worst >= hope))


def _append(
    state: BeamState, parents: Int[Array, "B W"], tokens: Int[Array, "B W"]
) -> Int[Array, "B W A"]:
    written = jnp.take_along_axis(state.token_ids, parents[:, :, None], axis=1)
    return written.at[:, :, state.step].set(tokens)


def _keep_best(kept: Answers, new: Answers) -> Answers:
    """The best of both, as many as `kept` has places. Of equal scores the older answer stays."""
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), kept, new)
    scores, places = jax.lax.top_k(both.scores, kept.scores.shape[1])
    return Answers(
        scores=scores,
        token_ids=jnp.take_along_axis(both.token_ids, places[:, :, None], axis=1),
        lengths=jnp.take_along_axis(both.lengths, places, axis=1),
    )
