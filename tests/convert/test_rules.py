"""The rule engine refuses everything that is not exact, and says all of it at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert import problems as listed
from convert import rules
from convert.problems import ConversionError
from convert.rules import Excuse, Rule, convert, flatten
from convert.sources import ArraySource
from minigpt4_jax.config import UserError


def shaped(*shape: int) -> SimpleNamespace:
    """Stands in for `jax.ShapeDtypeStruct`."""
    return SimpleNamespace(shape=shape)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


TARGET = {
    "embedding": shaped(5, 4),
    "layers": {str(i): {"up": {"kernel": shaped(4, 6), "bias": shaped(6)}} for i in range(3)},
}
RULES = (
    Rule("embedding", ("emb",), rules.identity),
    Rule("layers/{i}/up/kernel", ("h.{i}.w",), rules.transpose),
    Rule("layers/{i}/up/bias", ("h.{i}.b",), rules.identity),
)
EXCUSES = (Excuse("extra.*", "not used here"),)


def arrays() -> dict[str, np.ndarray]:
    return {
        "emb": numbered(5, 4),
        **{f"h.{i}.w": numbered(6, 4) + i for i in range(3)},
        **{f"h.{i}.b": numbered(6) + i for i in range(3)},
        "extra.thing": numbered(2),
    }


def run(
    source: dict[str, np.ndarray],
    table: tuple[Rule, ...] = RULES,
    excuses: tuple[Excuse, ...] = EXCUSES,
) -> rules.Conversion:
    return convert(ArraySource(source), table, excuses=excuses, target=TARGET)


def problems(*args: Any) -> dict[str, list[str]]:
    """Kind -> texts of the error that a conversion raises."""
    with pytest.raises(ConversionError) as caught:
        run(*args)
    found: dict[str, list[str]] = {}
    for problem in caught.value.problems:
        found.setdefault(problem.kind, []).append(problem.text)
    return found


def test_rules_are_expanded_over_the_layers_of_the_model() -> None:
    done = run(arrays())
    assert {path: x.shape for path, x in flatten(done.params)} == {
        path: x.shape for path, x in flatten(TARGET)
    }
    for i in range(3):
        np.testing.assert_array_equal(
            done.params["layers"][str(i)]["up"]["kernel"], arrays()[f"h.{i}.w"].T
        )
    assert done.excused == (("extra.thing", "not used here"),)
    assert len(list(flatten(done.params))) == 7


def test_missing_source_is_reported() -> None:
    source = arrays()
    del source["h.1.b"]
    assert problems(source) == {listed.MISSING: ["h.1.b (for layers/1/up/bias)"]}


def test_unused_source_is_reported() -> None:
    assert problems(arrays() | {"lora.A": numbered(2, 3)}) == {listed.UNUSED: ["lora.A [2, 3]"]}


def test_layer_too_many_in_the_source_is_reported() -> None:
    source = arrays() | {"h.3.w": numbered(6, 4), "h.3.b": numbered(6)}
    assert problems(source) == {listed.UNUSED: ["h.3.w [6, 4]", "h.3.b [6]"]}


def test_target_filled_twice_is_reported() -> None:
    table = (*RULES, Rule("embedding", ("emb",), rules.identity))
    assert problems(arrays(), table) == {listed.DOUBLE: ["embedding (from emb; from emb)"]}


def test_unfilled_target_is_reported() -> None:
    assert problems(arrays(), RULES[:2]) == {
        listed.UNUSED: ["h.0.b [6]", "h.1.b [6]", "h.2.b [6]"],
        listed.UNFILLED: [f"layers/{i}/up/bias [6]" for i in range(3)],
    }


def test_rule_for_a_parameter_that_the_model_lacks_is_reported() -> None:
    table = (*RULES, Rule("layers/{i}/down/kernel", ("h.{i}.w",), rules.identity))
    assert problems(arrays(), table) == {
        listed.UNKNOWN: [f"layers/{i}/down/kernel" for i in range(3)]
    }


def test_rule_for_layers_of_a_part_that_the_model_lacks_is_reported() -> None:
    table = (*RULES, Rule("blocks/{i}/bias", ("emb",), rules.identity))
    assert problems(arrays(), table) == {listed.UNKNOWN: ["blocks/{i}/bias"]}


def test_wrong_shape_is_reported() -> None:
    found = problems(arrays() | {"h.2.w": numbered(6, 5)})
    assert found == {
        listed.MISSHAPEN: ["layers/2/up/kernel <- h.2.w: shape [5, 6], the model has [4, 6]"]
    }


def test_shape_that_an_operation_cannot_take_is_reported() -> None:
    found = problems(arrays() | {"h.2.w": numbered(6)})
    assert list(found) == [listed.UNFIT]
    assert "expected 2 axes, the tensor has shape [6]" in found[listed.UNFIT][0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_reported(bad: float) -> None:
    source = arrays()
    source["emb"][1, 2] = bad
    assert problems(source) == {
        listed.NOT_FINITE: ["embedding <- emb: 1 of 20 values are NaN or infinite"]
    }


def test_cast_that_overflows_is_reported() -> None:
    source = ArraySource(arrays() | {"emb": np.full((5, 4), 1e6, np.float32)})
    with np.errstate(over="ignore"), pytest.raises(ConversionError, match="20 of 20 values"):
        convert(source, RULES, excuses=EXCUSES, target=TARGET, dtype=np.float16)


def test_excuse_for_a_tensor_that_is_used_is_reported() -> None:
    found = problems(arrays(), RULES, (*EXCUSES, Excuse("em*", "by mistake")))
    assert found == {listed.CONFLICT: ["emb (excuse 'em*')"]}


def test_excused_copy_that_is_no_copy_is_reported() -> None:
    excuses = (*EXCUSES, Excuse("head", "tied", same_as="emb"))
    assert run(arrays() | {"head": numbered(5, 4)}, RULES, excuses).excused
    found = problems(arrays() | {"head": numbered(5, 4) + 1}, RULES, excuses)
    assert found == {listed.NOT_EQUAL: ["head, said to equal emb"]}


def test_all_problems_are_listed_together() -> None:
    source = arrays() | {"lora.A": numbered(2), "h.0.w": numbered(5, 4)}
    source["emb"][0, 0] = np.nan
    del source["h.1.b"]
    table = (
        *RULES,
        Rule("embedding", ("emb",), rules.identity),
        Rule("x", ("emb",), rules.identity),
    )
    with pytest.raises(ConversionError) as caught:
        run(source, table)
    kinds = {p.kind for p in caught.value.problems}
    assert kinds == {
        listed.MISSING,
        listed.UNUSED,
        listed.DOUBLE,
        listed.UNKNOWN,
        listed.MISSHAPEN,
        listed.NOT_FINITE,
    }
    message = str(caught.value)
    for name in ("h.1.b", "lora.A", "embedding", "x", "h.0.w"):
        assert name in message
    assert f"{len(caught.value.problems)} problem(s)" in message


def test_message_joins_the_layers_of_one_problem() -> None:
    with pytest.raises(ConversionError) as caught:
        run({"emb": numbered(5, 4)})
    assert len(caught.value.problems) == 6
    assert "h.{0..2}.w (for layers/{0..2}/up/kernel)" in str(caught.value)


@pytest.mark.parametrize("pattern", ["*", "{i}", "*.bias", "", ".*", "{i}.weight"])
def test_catch_all_excuse_cannot_be_written(pattern: str) -> None:
    with pytest.raises(UserError, match="starts with a wildcard"):
        Excuse(pattern, "lazy")


def test_excuse_takes_numbers_for_i_and_dots_literally() -> None:
    excuse = Excuse("layers.{i}.inv_freq", "buffer")
    assert excuse.matches("layers.12.inv_freq")
    assert not excuse.matches("layers.x.inv_freq")
    assert not excuse.matches("layers.1.inv_freq_scale")
    assert not excuse.matches("layersX1.inv_freq")


def test_source_dtype_is_kept_unless_another_is_asked_for() -> None:
    halves = {name: x.astype(np.float16) for name, x in arrays().items()}
    kept = convert(ArraySource(halves), RULES, excuses=EXCUSES, target=TARGET)
    cast = convert(ArraySource(halves), RULES, excuses=EXCUSES, target=TARGET, dtype=np.float32)
    assert {x.dtype for _, x in flatten(kept.params)} == {np.dtype(np.float16)}
    assert {x.dtype for _, x in flatten(cast.params)} == {np.dtype(np.float32)}


def test_tensors_are_read_one_at_a_time() -> None:
    reads: list[str] = []

    class Recording(ArraySource):
        def get(self, name: str) -> np.ndarray:
            reads.append(name)
            return super().get(name)

    seen: list[tuple[int, int, str]] = []
    convert(
        Recording(arrays()),
        RULES,
        excuses=EXCUSES,
        target=TARGET,
        on_tensor=lambda done, total, path: seen.append((done, total, ",".join(reads))),
    )
    assert sorted(reads) == sorted(set(arrays()) - {"extra.thing"})
    assert [done for done, _, _ in seen] == list(range(1, 8))
    assert seen[0] == (1, 7, "emb")  # nothing is read ahead


def test_parts_of_a_stack_are_split_in_order() -> None:
    qkv = numbered(6, 2)
    parts = [rules.rows(part, 3).apply(qkv) for part in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), qkv)
    with pytest.raises(ValueError, match="7 rows do not divide into 3"):
        rules.rows(0, 3).apply(numbered(7, 2))


def test_convolution_kernel_moves_its_channels_last() -> None:
    kernel = numbered(5, 3, 2, 4)
    moved = rules.conv_kernel.apply(kernel)
    assert moved.shape == (2, 4, 3, 5)
    assert moved[1, 2, 0, 4] == kernel[4, 0, 1, 2]
