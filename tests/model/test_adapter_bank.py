"""Slots and single modules: drawn by hand, and against their merged weights."""

import gc
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.weights import AdapterWeights, LoraWeights

from .conftest import hooked


def adapter(components=(), **modules: LoraWeights) -> AdapterWeights:
    """An adapter made by hand; ``l0`` is the module "0"."""
    named = {name.removeprefix("l"): weights for name, weights in modules.items()}
    rank = max((weights.rank for weights in named.values()), default=0)
    return AdapterWeights(named, None, rank, 0, version="", signature=(), components=frozenset(components))


def random_update(module: nn.Module, rank: int, *, dora=False, seed=0) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    out, *rest = module.weight.shape
    normal = partial(torch.randn, generator=generator, dtype=torch.promote_types(module.weight.dtype, torch.float32))
    return LoraWeights(normal(rank, *rest), normal(out, rank), 1 + normal(out) if dora else None)


def merged(module: nn.Module, update: LoraWeights | None) -> nn.Module:
    """The module with the update in its weight: what a row must compute, by the definition of LoRA and DoRA."""
    module = deepcopy(module)
    if update is not None:
        weight = module.weight.data.flatten(1)
        scaled = weight if update.gain is None else update.gain[:, None] * weight
        module.weight.data = (scaled + update.up @ update.down.flatten(1)).view_as(module.weight)
    return module


def identity(size: int = 2) -> nn.Sequential:
    """y = x + (10, 20)."""
    base = nn.Sequential(nn.Linear(size, size))
    base[0].weight.data = torch.eye(size)
    base[0].bias.data = 10.0 * torch.arange(1, size + 1)
    return base.eval()


FIRST_TO_SECOND = LoraWeights(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [5.0]]))  # y2 += 5 x1
SWAP = LoraWeights(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # y += (x2, x1)


def test_each_thread_has_rows_of_its_own():
    base = identity()
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    bank.put(1, adapter(l0=SWAP))
    both_inside = Barrier(2)

    def run(slot: int | None) -> list[float]:
        with torch.no_grad(), bank.rows([slot]):
            both_inside.wait(60)
            found = base(torch.tensor([[1.0, 2.0]]))
            both_inside.wait(60)
        return found[0].tolist()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, (0, 1))) == [[11, 27], [13, 23]]


def test_each_row_gets_its_own_update():
    # Three rows (1, 2): the base, an adapter of rank 1, one of rank 2.
    base = identity()
    bank = AdapterBank(base, 4)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    bank.put(3, adapter(l0=SWAP))
    x = torch.tensor([[1.0, 2.0]] * 3)
    with torch.no_grad(), bank.rows([None, 0, 3]):
        assert base(x).tolist() == [[11, 22], [11, 27], [13, 23]]
    with torch.no_grad(), bank.rows([3, 3, 3]):
        assert base(x).tolist() == [[13, 23]] * 3
    with torch.no_grad(), bank.rows([None] * 3):
        assert base(x).tolist() == [[11, 22]] * 3


def test_slots_in_a_tensor_are_read_when_the_model_runs():
    # The host knows none of them: the same operations give whatever the tensor holds, and an empty slot is the base.
    base = identity()
    bank = AdapterBank(base, 4)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    bank.put(3, adapter(l0=SWAP))
    x, slots_B = torch.tensor([[1.0, 2.0]] * 3), torch.zeros(3, dtype=torch.long)
    with torch.no_grad(), bank.rows_on_device(slots_B):
        assert base(x).tolist() == [[11, 27]] * 3
        slots_B.copy_(torch.tensor([bank.num_slots, 3, 1]))
        assert base(x).tolist() == [[11, 22], [13, 23], [11, 22]]
        with torch.no_grad(), bank.rows([0, 3, None]):
            assert base(x).tolist() == [[11, 27], [13, 23], [11, 22]]


def test_the_layout_changes_with_hooks_and_memory_alone():
    parts = {name: nn.Linear(2, 2) for name in ("detr_encoder", "detr_decoder")}
    base = nn.ModuleDict(parts).eval()
    bank = AdapterBank(base, 4)

    def layout() -> tuple[int, ...]:
        return bank.layout(["detr_encoder", "detr_decoder"])

    empty = layout()
    bank.put(0, adapter(detr_encoder=FIRST_TO_SECOND))
    first = layout()
    assert (first[0] != empty[0], first[1] == empty[1]) == (True, True)
    memory = bank.size_bytes
    # another of the same rank takes its place, and it counts
    bank.put(0, adapter(detr_encoder=LoraWeights(FIRST_TO_SECOND.down, 2 * FIRST_TO_SECOND.up)))
    assert (layout(), bank.size_bytes) == (first, memory)
    with torch.no_grad():
        x = torch.tensor([[1.0, 2.0]])
        plain = base["detr_encoder"](x)
        with bank.rows([0]):
            assert (base["detr_encoder"](x) - plain).tolist() == [[0, 10]]
    seen = [first]
    for step in (
        lambda: bank.put(1, adapter(detr_encoder=FIRST_TO_SECOND)),  # one more place
        lambda: bank.put(1, adapter(detr_encoder=SWAP)),  # a larger rank
        lambda: bank.put(2, adapter(detr_decoder=SWAP)),  # another module
        lambda: bank.clear(2),
    ):
        step()
        assert layout() not in seen
        seen.append(layout())
    # a place is given back and taken again
    bank.clear(1)
    assert layout() == seen[-1]
    bank.put(3, adapter(detr_encoder=FIRST_TO_SECOND))
    assert layout() == seen[-1]


def test_an_adapter_that_does_not_fit_leaves_an_empty_slot():
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=SWAP, l1=SWAP))
    with pytest.raises(RuntimeError, match="size of tensor"):
        bank.put(0, adapter(l0=SWAP, l1=LoraWeights(torch.ones(2, 3), torch.ones(2, 2))))
    assert bank.components(0) == frozenset()
    assert (bank.size_bytes, hooked(base)) == (0, set())
    with pytest.raises(AssertionError, match="empty"), bank.rows([0]):
        pass


def test_gain_leaves_the_bias_alone():
    # DoRA doubles what the weight gives, (1, 2), and not the bias (10, 20); the row beside it is plain.
    base = identity()
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=LoraWeights(FIRST_TO_SECOND.down, FIRST_TO_SECOND.up, torch.tensor([2.0, 2.0]))))
    bank.put(1, adapter(l0=FIRST_TO_SECOND))
    with torch.no_grad(), bank.rows([0, 1, None]):
        assert base(torch.tensor([[1.0, 2.0]] * 3)).tolist() == [[12, 29], [11, 27], [11, 22]]
    with torch.no_grad(), bank.rows([0]):
        assert base(torch.tensor([[1.0, 2.0]])).tolist() == [[12, 29]]


def test_windows_follow_their_row():
    # Two rows of two windows each: the windows of the first row come first.
    base = identity()
    bank = AdapterBank(base, 1)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])[:, None]
    with torch.no_grad(), bank.rows([0, None]):
        assert base(x)[:, 0, 1].tolist() == [25, 30, 20, 20]
    with torch.no_grad(), bank.rows([None, 0]):
        assert base(x)[:, 0, 1].tolist() == [20, 20, 35, 40]


def test_outside_rows_the_base_answers():
    # Also after an exception inside, and inside an outer block once the inner one is left.
    base = identity()
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    bank.put(1, adapter(l0=SWAP))
    x = torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        assert base(x).tolist() == [[11, 22]]
        with pytest.raises(KeyError), bank.rows([0]):
            raise KeyError
        assert base(x).tolist() == [[11, 22]]
        with bank.rows([0]):
            with bank.rows([1]):
                assert base(x).tolist() == [[13, 23]]
            assert base(x).tolist() == [[11, 27]]


def test_misuse_is_an_assertion_and_empty_inputs_pass():
    # Inputs that do not divide into rows would give some rows the adapter of others; an empty slot is not the base.
    base = identity()
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=SWAP))
    with pytest.raises(AssertionError, match=r"0 got an input \(3, 2\) for 2 rows"), bank.rows([0, None]):
        base(torch.zeros(3, 2))
    with pytest.raises(AssertionError, match=r"slots \[1\] are empty"), bank.rows([0, 1]):
        pass
    with pytest.raises(AssertionError, match="below 2, got 2"):
        bank.put(2, adapter(l0=SWAP))
    for shape in ((0, 2), (2, 0, 2)):  # no boxes, no detections
        for slots in ([0, None], []):
            with torch.no_grad(), bank.rows(slots):
                assert base(torch.zeros(shape)).shape == shape


# ---- single modules against their merged weights --------------------------------------------------------------------

MODULES = {
    "linear": (lambda: nn.Linear(5, 3), (4, 7, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "linear on windows": (lambda: nn.Linear(5, 3), (12, 2, 2, 5)),
    "linear on channels last": (lambda: nn.Linear(5, 3), (4, 6, 6, 5)),
    "conv 1x1": (lambda: nn.Conv2d(5, 3, 1), (4, 5, 6, 7)),
    "conv 3x3": (lambda: nn.Conv2d(5, 3, 3, padding=1), (4, 5, 6, 7)),
    "patches": (lambda: nn.Conv2d(5, 3, 2, stride=2, bias=False), (4, 5, 6, 8)),
    "conv to a point, rois": (lambda: nn.Conv2d(5, 3, (4, 4)), (12, 5, 4, 4)),
    "conv same": (lambda: nn.Conv2d(5, 3, 3, padding="same"), (4, 5, 6, 7)),
}
SLOTS = {"mixed": [2, None, 0, 1], "one": [1] * 4, "repeated": [0, 2, 2, 0], "with base": [None, 1, 1, None]}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_single_modules(make, shape, slots):
    # Ranks 1, 4 and 2, the last with DoRA; float64 shows any mistake.
    torch.manual_seed(0)
    module = make().double()
    base = nn.Sequential(module)
    bank = AdapterBank(base, 3)
    updates = {0: random_update(module, 1), 1: random_update(module, 4, seed=1)}
    updates[2] = random_update(module, 2, dora=True, seed=2)
    for slot, update in updates.items():
        bank.put(slot, adapter(l0=update))
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        with bank.rows(slots):
            found = base(x)
        rows = x.split(len(x) // len(slots))
        expected = [merged(module, updates.get(slot))(row) for slot, row in zip(slots, rows, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 3, padding=1)])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(make, dora, autocast):
    # Under autocast, and on a base that is bfloat16 itself, the output has the base's dtype and PEFT's values.
    torch.manual_seed(0)
    base = nn.Sequential(make()).to(torch.float32 if autocast else torch.bfloat16)
    update = random_update(base[0], 2, dora=dora)
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=update))
    bank.put(1, adapter(l0=random_update(base[0], 3, seed=1)))
    x = torch.randn(3, 6, 6, 6, dtype=base[0].weight.dtype)
    expected = merged(base[0].float(), update)(x.float())
    base.to(x.dtype)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast), bank.rows([0, 1, None]):
            found = base(x)
        assert found.dtype == torch.bfloat16
        assert (found[0] - expected[0]).abs().max() < 0.03 * expected.abs().max()
    assert bank.size_bytes == 1.5 * sum(4 * 3 * 3 * tensor[0].numel() for tensor in (update.down, update.up.T)) + (
        4 * 3 * 6 if dora else 0
    )


def test_put_during_inference_mode_serves_outside_of_it():
    # The model thread may hold inference_mode all the time.
    base = identity()
    bank = AdapterBank(base, 1)
    with torch.inference_mode():
        bank.put(0, adapter(l0=SWAP))
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with bank.rows([0]):
        base(x).sum().backward()
    assert x.grad.tolist() == [[2, 2]]


# ---- slots ------------------------------------------------------------------------------------------------------


def test_hooks_only_where_an_adapter_is():
    # An idle bank costs nothing: modules without an update have no hook.
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    bank = AdapterBank(base, 2)
    assert hooked(base) == set()
    bank.put(0, adapter(("scoring",), l0=SWAP, l2=SWAP))
    bank.put(1, adapter(("text_encoder",), l1=SWAP, l2=SWAP))
    assert hooked(base) == {"0", "1", "2"}
    assert bank.components(0) == {"scoring"}
    assert bank.components(None) == bank.components(7) == frozenset()
    assert bank.adapts("text_encoder")
    bank.put(1, adapter((), l2=SWAP))  # replaces
    assert hooked(base) == {"0", "2"}
    assert not bank.adapts("text_encoder")
    bank.clear(0)
    bank.clear(0)
    assert hooked(base) == {"2"}
    assert bank.size_bytes > 0
    bank.clear(1)
    assert hooked(base) == set()
    assert bank.size_bytes == 0


def test_neighbours_are_not_disturbed():
    # Filling, replacing and emptying one slot changes no other one, whatever the ranks.
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    base = nn.Sequential(module)
    bank = AdapterBank(base, 3)
    updates: dict[int, LoraWeights] = {}
    x = torch.randn(4, 4, dtype=torch.float64)
    steps = [(0, 2), (1, 7), (0, 1), (1, None), (2, 3), (1, 1), (0, None), (2, 9), (2, None), (0, 4)]
    for seed, (slot, rank) in enumerate(steps):
        if rank is None:
            bank.clear(slot)
            del updates[slot]
        else:
            updates[slot] = random_update(module, rank, dora=seed % 3 == 0, seed=seed)
            bank.put(slot, adapter(l0=updates[slot]))
        slots = [*(sorted(updates) * 4)[:3], None]
        with torch.no_grad(), bank.rows(slots):
            found = base(x)
        expected = torch.stack([merged(module, updates.get(slot))(row) for slot, row in zip(slots, x, strict=True)])
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0, 1, None], [1, 1]])
def test_a_slot_that_is_used_again_for_other_modules(order):
    # The second adapter of slot 1 leaves module 0 alone, where the first one's update may still lie.
    base = nn.Sequential(identity()[0], identity()[0])
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    bank.put(1, adapter(l0=SWAP, l1=SWAP))
    bank.put(1, adapter(l1=FIRST_TO_SECOND))
    expected = {None: [21, 42], 0: [21, 47], 1: [21, 42 + 5 * 11]}
    with torch.no_grad(), bank.rows(order):
        assert base(torch.tensor([[1.0, 2.0]] * len(order))).tolist() == [expected[slot] for slot in order]


def test_a_put_that_fails_leaves_the_slot_empty(monkeypatch):
    # Out of memory at the second module: the other slots go on, nothing is half there.
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    bank = AdapterBank(base, 2)
    bank.put(0, adapter(l0=FIRST_TO_SECOND))
    before = base(torch.ones(1, 2))
    with bank.rows([0]):
        adapted = base(torch.ones(1, 2))
    bad = LoraWeights(torch.zeros(1, 3), torch.zeros(2, 1))  # does not fit: the copy raises
    with pytest.raises(RuntimeError):
        bank.put(1, adapter(("scoring",), l0=SWAP, l1=bad))
    assert hooked(base) == {"0"}
    assert not bank.adapts("scoring")
    with bank.rows([0, None]):
        assert torch.equal(base(torch.ones(2, 2)), torch.cat([adapted, before]))
    bank.put(1, adapter(l1=SWAP))


def test_memory_stays_flat():
    # Many adapters come and go, of changing rank: as many tensors and bytes as after the first.
    base = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(2, 2, 3))
    bank = AdapterBank(base, 3)
    bank.put(0, adapter(l0=random_update(base[0], 2)))

    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        return len(found), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())

    before, size = tensors(), bank.size_bytes
    for turn in range(200):
        bank.put(
            1 + turn % 2, adapter(l0=random_update(base[0], 1 + turn % 8), l1=random_update(base[1], 3, dora=True))
        )
        if turn % 3:
            bank.clear(1 + turn % 2)
    bank.clear(1)
    bank.clear(2)
    bank.put(0, adapter(l0=random_update(base[0], 2)))
    assert tensors() == before
    assert bank.size_bytes == size
    assert hooked(base) == {"0"}
