"""Merging by functions in C++: as torch's operators do it, and only where it may."""

import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchprofile import profile_macs

from prunefront.compress import compress
from prunefront.macs import macs_detail
from prunefront.ops import native
from prunefront.ops.merge import bipartite_match, match_tail, merge_matched, merge_tail
from prunefront.ops.select import top_tokens
from prunefront.ops.tokens import Tokens
from prunefront.runtimes import prepare
from tests.unit.library.models import build, schedules

pytestmark = pytest.mark.compile  # They are built by the machine's C++ compiler.

WIDTH = 40  # Not a multiple of the sixteen numbers that are added side by side.
MERGING = ("tome", "tome-noprop", "diffrate", "ppt-mixed", "ppt-pool", "hybrid")


@pytest.fixture(autouse=True)
def built() -> None:
    assert native.is_available()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Without what this process knows of the operators, before and after."""
    native.is_available.cache_clear()
    yield
    native.is_available.cache_clear()


class Calls:
    """Counts the calls of the operators within, from Python and from compiled code."""

    def __enter__(self) -> Self:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)
        self.number = sum(event.name.startswith("prunefront_native::") for event in self._profile.events() or ())


def merged_by_torch(keys: Tensor, x: Tensor, size: Tensor | None, prefix: int, removed: int) -> tuple[Tensor, Tensor]:
    match = bipartite_match(keys.mean(dim=1), removed, prefix)
    return merge_matched(x, torch.ones(x.shape[:2]) if size is None else size, match, prefix)


def sorted_and_merged_by_torch(
    scores: Tensor, x: Tensor, size: Tensor | None, prefix: int, pruned_to: int, merged_to: int
) -> tuple[Tensor, Tensor]:
    tokens = Tokens(x=x, num_prefix=prefix, size=size).take(top_tokens(scores, pruned_to))
    match = match_tail(tokens.x[:, prefix:], merged_to)
    merged, sizes = merge_tail(tokens.x[:, prefix:], None if size is None else tokens.sizes()[:, prefix:], match)
    return torch.cat((tokens.x[:, :prefix], merged), 1), torch.cat((tokens.sizes()[:, :prefix], sizes), 1)


def inputs(batch: int, tokens: int, dtype: torch.dtype, sized: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys as a joint projection lays them out, tokens, and sizes."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3, 5, 24, generator=generator).to(dtype)
    size = torch.rand(batch, tokens, generator=generator) * 3 + 0.5 if sized else None
    return qkv.permute(2, 0, 3, 1, 4)[1], torch.randn(batch, tokens, WIDTH, generator=generator).to(dtype), size


def assert_alike(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    # Compared with what float32 gives for the same numbers: one rounding of the result.
    torch.testing.assert_close(got[0].float(), expected[0], atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8)
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("batch", "tokens", "prefix", "removed"),
    [(1, 197, 1, 16), (2, 50, 0, 25), (3, 33, 2, 15), (1, 150, 5, 70), (1, 3, 1, 1), (2, 9, 1, 0), (1, 2, 0, 1)],
)
def test_merging_is_what_torch_computes(
    batch: int, tokens: int, prefix: int, removed: int, sized: bool, dtype: torch.dtype
) -> None:
    keys, x, size = inputs(batch, tokens, dtype, sized)
    got = native.merge_matched(keys[:, :, prefix:], x, size, prefix, removed)
    assert_alike(got, merged_by_torch(keys[:, :, prefix:].float(), x.float(), size, prefix, removed), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("batch", "tokens", "prefix", "pruned_to", "merged_to"),
    [(1, 197, 1, 180, 150), (2, 50, 2, 40, 7), (1, 20, 1, 19, 1), (3, 30, 0, 30, 29), (1, 9, 1, 5, 5)],
)
def test_sorting_and_merging_is_what_torch_computes(
    batch: int, tokens: int, prefix: int, pruned_to: int, merged_to: int, sized: bool, dtype: torch.dtype
) -> None:
    _, x, size = inputs(batch, tokens, dtype, sized)
    scores = torch.rand(batch, tokens - prefix, generator=torch.Generator().manual_seed(1))
    got = native.sort_and_merge(scores, x, size, prefix, pruned_to, merged_to)
    assert_alike(got, sorted_and_merged_by_torch(scores, x.float(), size, prefix, pruned_to, merged_to), dtype)


def test_merging_by_hand() -> None:
    # Behind one class token, set a is the second patch alone. Its cosines to the others are 0.6 and 0.8.
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]).reshape(1, 1, 3, 2)
    x = torch.tensor([[9.0], [1.0], [2.0], [6.0]]).reshape(1, 4, 1)
    merged, size = native.merge_matched(keys, x, torch.tensor([[1.0, 1.0, 3.0, 1.0]]), 1, 1)
    assert merged.flatten().tolist() == [9.0, 1.0, (3 * 2.0 + 6.0) / 4]
    assert size.flatten().tolist() == [1.0, 1.0, 4.0]


def test_the_first_of_equals_is_taken() -> None:
    keys = torch.ones(1, 1, 6, 2)
    x = torch.arange(7.0).reshape(1, 7, 1)
    merged, size = native.merge_matched(keys, x, None, 1, 1)
    # Set a are tokens 2, 4, 6, set b are 1, 3, 5: 2 goes to 1.
    assert merged.flatten().tolist() == [0.0, 4.0, 6.0, 1.5, 3.0, 5.0]
    assert size.flatten().tolist() == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]


def test_images_may_share_their_sizes_and_tokens_need_not_be_contiguous() -> None:
    keys, x, _ = inputs(2, 20, torch.float32, sized=False)
    size = torch.linspace(1.0, 2.0, 20).expand(2, -1)
    wide = torch.cat((x, x), dim=2)[:, :, :WIDTH]
    turned = keys.transpose(-1, -2).contiguous().transpose(-1, -2)
    got = native.merge_matched(turned[:, :, 1:], wide, size, 1, 5)
    assert_alike(got, merged_by_torch(keys[:, :, 1:], x, size, 1, 5), torch.float32)


def test_scores_that_are_not_numbers_come_first_and_break_nothing() -> None:
    _, x, _ = inputs(1, 64, torch.float32, sized=False)
    scores = torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    scores[0, 10], scores[0, 20] = math.nan, -math.inf
    merged, _ = native.sort_and_merge(scores, x, None, 0, 63, 63)
    torch.testing.assert_close(merged[0, 0], x[0, 10])
    merged, size = native.sort_and_merge(torch.full((1, 64), math.nan), x * math.nan, None, 0, 50, 20)
    assert merged.shape == (1, 20, WIDTH) and merged.isnan().all()


@pytest.mark.parametrize("method", MERGING)
def test_models_give_the_same_logits_either_way(method: str) -> None:
    config = schedules()[method]
    model = compress(build(config.model), config)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with Calls() as calls:
            got = model(images)
        assert calls.number, "the operators are used"
        with Calls() as calls, native.disabled():
            torch.testing.assert_close(got, model(images), atol=2e-5, rtol=1e-4)
        assert not calls.number
        with Calls() as calls:  # Whatever is recorded is recorded by torch.
            torch.testing.assert_close(got, model(images, return_aux=True)[0], atol=2e-5, rtol=1e-4)
        assert not calls.number


def test_gradients_exports_traces_and_other_dtypes_are_torchs() -> None:
    x = torch.randn(1, 4, 8)
    assert native.runs(x) and native.runs(x, x.clone())
    assert not native.runs(x.requires_grad_()) and not native.runs(torch.randn(1, 4, 8).half())
    assert not native.runs(torch.randn(1, 4, 8), torch.randn(1, 4, 8).bfloat16())
    assert not native.runs(torch.randn(1, 4, 8, device="meta"))
    with torch.no_grad():
        assert native.runs(x)

    config = schedules()["tome"]
    model = compress(build(config.model), config)
    images = torch.randn(2, 3, 48, 48)
    model.train()(images).sum().backward()
    assert all(weight.grad is not None for weight in model.blocks[0].parameters())
    with torch.no_grad():
        program = torch.export.export(model.eval(), (images,))
    assert "prunefront_native" not in str(program.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about every size it freezes
        nodes = profile_macs(model.requires_grad_(False), images, reduction=None)
    assert not any("prunefront_native" in node.operator for node in nodes)


@pytest.mark.parametrize("method", ["tome", "diffrate", "hybrid"])
def test_counters_of_floating_point_operations_count_what_they_do(method: str) -> None:
    config = schedules()[method]
    model = compress(build(config.model), config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # it does not count the CPU's fused kernel
        model(torch.randn(2, 3, 48, 48))
    assert counter.get_total_flops() == 2 * 2 * macs_detail(config).total


@pytest.mark.parametrize("method", ["tome", "diffrate"])
def test_a_compiled_model_merges_by_them_too(method: str) -> None:
    config = schedules()[method]
    model = compress(build(config.model), config)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    forward = prepare(model, "compile", "fp32", torch.device("cpu"))
    with torch.inference_mode():
        torch.testing.assert_close(forward(images), model(images), atol=2e-5, rtol=1e-4)
        with Calls() as calls:
            forward(images)
    assert calls.number == sum(site.op.startswith("merge") for site in config.sites)


@pytest.mark.parametrize("batch", [1, 2])
def test_more_threads_compute_the_same(batch: int) -> None:
    keys, x, size = inputs(batch, 197, torch.float32, sized=True)
    scores = torch.rand(batch, 197, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(native.merge_matched(keys, x, size, 0, 60))
            results.append(native.sort_and_merge(scores, x, size, 0, 150, 100))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_tensors_of_another_dtype_are_refused_and_given_back() -> None:
    keys, x, _ = inputs(1, 9, torch.float32, sized=False)
    with pytest.raises(RuntimeError, match="expected tokens in float32 or bfloat16"):
        native.merge_matched(keys.double(), x.double(), None, 0, 1)
    assert native.merge_matched(keys, x, None, 0, 1)[0].shape == (1, 8, WIDTH)


def test_operators_leak_no_memory() -> None:
    # Tensors they are given belong to them: one that is not given back would stay for good.
    script = (
        "import resource, torch\n"
        "from prunefront.ops import native\n"
        "assert native.is_available()\n"
        "x, keys, size = torch.randn(1, 256, 1024), torch.randn(1, 1, 64, 256).transpose(2, 3), torch.ones(1, 256)\n"
        "def run():\n"
        "    for _ in range(200):\n"  # Two copies, of 1.06 MB, and a result of 0.9 MB each time.
        "        native.merge_matched(keys, x.mT.contiguous().mT, size, 0, 40)\n"
        "        native.sort_and_merge(torch.rand(1, 256), x, size, 0, 200, 150)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "run()\n"
        "before = run()\n"
        "print(run() - before)\n"
    )
    grown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert float(grown) < 40  # MiB; all of them would be 600


def test_without_a_compiler_torch_merges(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    assert not native.is_available()
    assert not native.runs(torch.randn(1, 4, 8))


def test_a_compiler_that_fails_is_told_and_torch_merges(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nif '--version' not in sys.argv: sys.exit('no such flag')\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, logger="prunefront.ops.native"):
        assert not native.is_available()
    assert "Tokens are merged by torch alone" in caplog.text and "no such flag" in caplog.text
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_it_is_built_once_for_a_user(tmp_path: Path) -> None:
    # In processes of their own: a process can give torch its operators once.
    script = "from prunefront.ops import native; assert native.is_available()"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    (built,) = (tmp_path / "prunefront" / "native").iterdir()
    before = os.stat(built)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    after = os.stat(built)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
