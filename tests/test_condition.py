"""Conditions of several parts, and functions that serve tensors, Conditions and None alike."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from dis_ssm.condition import PARTS, Condition, cat, rows, take, to


def whole(n: int = 4, seed: int = 0) -> Condition:
    """A condition with all parts."""
    g = torch.Generator().manual_seed(seed)
    return Condition(
        label=torch.randint(10, (n,), generator=g),
        vector=torch.randn(n, 5, generator=g),
        context=torch.randn(n, 3, 6, generator=g),
        context_mask=torch.rand(n, 3, generator=g) < 0.7,
        image=torch.randn(n, 2, 4, 4, generator=g),
    )


def assert_same(a: Condition, b: Condition):
    assert list(a.parts()) == list(b.parts())
    for name, part in a.parts().items():
        assert_close(part, b.parts()[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), slice(0, 0), [2, 0], range(1, 4), torch.tensor([3, 3]), torch.arange(4) > 1],
    ids=str,
)
def test_an_index_takes_rows_of_every_part(index):
    c = whole()
    part_index = list(index) if isinstance(index, range) else index
    taken = c[index]
    for name, part in c.parts().items():
        assert_close(taken.parts()[name], part[part_index], rtol=0, atol=0)
    assert len(taken) == len(c.label[part_index])


@pytest.mark.parametrize("index", [1, torch.tensor(1)])
def test_a_single_index_is_refused(index):
    with pytest.raises(ValueError, match="indexed by rows"):
        whole()[index]


def test_concatenation_undoes_slicing():
    c = whole()
    assert_same(Condition.cat([c[:1], c[1:3], c[3:]]), c)
    with pytest.raises(ValueError, match="have vector, image and some have not"):
        Condition.cat([c[:2], Condition(**c[:2].parts() | {"vector": None, "image": None})])
    with pytest.raises(ValueError, match="no condition"):
        Condition.cat([])


def test_it_moves_as_a_whole():
    moved = whole().to("meta", non_blocking=True)
    assert {part.device.type for part in moved.parts().values()} == {"meta"}
    assert list(moved.parts()) == list(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_made_null_alone(name):
    c = whole()
    null = c.null(name, null_class=10)
    nothing = 10 if name == "label" else 0
    changed = {name} | ({"context_mask"} if name == "context" else set())
    for other, part in c.parts().items():
        expected = torch.full_like(part, nothing if other == name else 0)
        assert_close(null.parts()[other], expected if other in changed else part, rtol=0, atol=0)


def test_all_parts_are_made_null():
    c = whole()
    null = c.null(null_class=torch.tensor(10))
    assert null.label.tolist() == [10] * 4 and null.label.dtype == torch.int64
    assert not any(part.any() for name, part in null.parts().items() if name != "label")
    assert_same(c.null("image", "label", null_class=3).null(null_class=10), null)
    only = Condition(vector=torch.ones(2, 3))
    assert list(only.null().parts()) == list(only.null("label").parts()) == ["vector"]
    assert only.null("label").vector.all()


def test_the_null_of_a_context_without_a_mask_gets_one():
    for context in (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)):
        c = Condition(context=context)
        null = c.null("context")
        assert not null.context.any() and null.context_mask.tolist() == [[False] * 3] * 2
        both = Condition.cat([c, null])
        assert both.context_mask.tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


def test_nulls_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="give null_class"):
        whole().null()
    with pytest.raises(ValueError, match="no 'text'"):
        whole().null("text")


@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "at least one part of label, vector"),
        ({"label": torch.zeros(2)}, r"label must be integer \(B\)"),
        ({"label": [1, 2]}, r"label must be integer \(B\), got \[1, 2\]"),
        ({"label": torch.zeros(2, 1, dtype=torch.int64)}, r"label .* got '\(2, 1\) torch.int64'"),
        ({"vector": torch.zeros(2, 3, dtype=torch.int64)}, "vector must be floating point"),
        (
            {"context": torch.zeros(2, 3)},
            r"context must be floating point \(B, M, d\) or integer \(B, M\)",
        ),
        ({"image": torch.zeros(2, 3, 4)}, r"image must be floating point \(B, C, H, W\)"),
        ({"context_mask": torch.ones(2, 3).bool()}, "without the context"),
        (
            {"context": torch.zeros(2, 3, 4), "context_mask": torch.ones(2, 4).bool()},
            "context_mask .* does not fit context",
        ),
        ({"context": torch.zeros(2, 3, 4), "context_mask": torch.ones(2, 3)}, "must be bool"),
        (
            {"label": torch.zeros(2, dtype=torch.int64), "image": torch.zeros(3, 1, 4, 4)},
            "image has 3 rows but label has 2",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        Condition(**parts)


def test_it_is_a_tree_of_its_parts():
    c = whole()
    leaves, spec = pytree.tree_flatten(c)
    assert len(leaves) == len(PARTS)
    assert_same(pytree.tree_unflatten(leaves, spec), c)
    doubled = pytree.tree_map(lambda part: torch.cat([part, part]), {"y": c})["y"]
    assert_same(doubled, Condition.cat([c, c]))
    shapes = pytree.tree_map(lambda part: tuple(part.shape), c[:2])
    assert (shapes.label, shapes.context) == ((2,), (2, 3, 6))
    alone = pytree.tree_map(lambda part: part + 1, Condition(label=c.label))
    assert alone.vector is None and alone.label.equal(c.label + 1)


def test_a_compiled_function_takes_it():
    def weighted(c: Condition) -> torch.Tensor:
        return c.vector * c.label[:, None] + c[: len(c)].null("vector").vector

    c = whole()
    found = torch.compile(weighted, backend="eager", fullgraph=True)(c)
    assert_close(found, weighted(c))


def test_the_functions_serve_tensors_as_pytorch_does():
    y = torch.arange(5)
    assert rows(y) == 5
    assert take(y, [4, 0]).tolist() == [4, 0] and take(y, slice(2)).tolist() == [0, 1]
    assert cat([y, y[:1]]).tolist() == [0, 1, 2, 3, 4, 0]
    assert to(y, "cpu") is y and to(y, "meta").device.type == "meta"


def test_the_functions_serve_conditions_and_nothing():
    c = whole()
    assert rows(c) == 4
    assert_same(take(c, [1]), c[1:2])
    assert_same(cat([c, c]), Condition.cat([c, c]))
    assert to(c, "meta").image.device.type == "meta"
    assert rows(None) is take(None, [0]) is cat([None, None]) is to(None, "cpu") is None


def test_mixed_kinds_are_refused():
    with pytest.raises(ValueError, match="throughout, got Tensor, NoneType"):
        cat([torch.zeros(1), None])
    with pytest.raises(ValueError, match="throughout, got Condition, Tensor"):
        cat([whole(), torch.zeros(1)])
