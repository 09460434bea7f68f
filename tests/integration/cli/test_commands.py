"""Commands as a user types them, on models small enough to run anywhere."""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import prunefront
from latency_tables.device import describe_device
from latency_tables.foreign_cpu import Patience
from latency_tables.schema import LatencyTable, load_table, save_table
from latency_tables.shipped import file_to_ship
from prunefront.cli.app import run
from prunefront.config import load_config
from prunefront.errors import FileWriteError
from tests.unit.latency_tables.fakes import DEVICE, simple_table

TINY = [
    "--img-size", "32", "--num-classes", "10", "--model-kwarg", "patch_size=8", "--model-kwarg", "embed_dim=48",
    "--model-kwarg", "depth=3", "--model-kwarg", "num_heads=3",
]  # fmt: skip
BESIDE_ALL = ["--max-foreign-cores", "1000"]  # other tests may run on this machine


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PRUNEFRONT_DATABASE_URL", raising=False)
    monkeypatch.delenv("PRUNEFRONT_URL", raising=False)
    monkeypatch.delenv("PRUNEFRONT_DEBUG", raising=False)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    line = ["config", "new", "--model", "vit_tiny_patch16_224", *TINY, "--method", "evit", "--at", "1"]
    assert run([*line, "--op", "fuse", "--keep-ratio", "0.5", "--out", str(path)]) == 0
    return path


def result(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_the_repositorys_spelling_and_ours_are_one_config(tmp_path: Path) -> None:
    model = ["config", "new", "--model", "deit_small_patch16_224"]
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.yaml"

    assert (
        run([*model, "--method", "evit", "--at", "3,6,9", "--op", "fuse", "--keep-ratio", "0.7", "--out", str(ours)])
        == 0
    )
    spelling = ["--base_keep_rate", "0.7", "--drop_loc", "(3, 6, 9)", "--fuse_token"]
    assert run([*model[:-1], "deit_small_patch16_shrink_base", *spelling, "--out", str(theirs)]) == 0

    assert load_config(ours).content_hash() == load_config(theirs).content_hash()


@pytest.mark.parametrize(("model", "blocks"), [("tiny", 12), ("small", 24)])
def test_the_spelling_of_tri_level_means_the_places_of_swin_on_a_swin(tmp_path: Path, model: str, blocks: int) -> None:
    # Blocks 1 to 3 of the third stage, behind two stages of two blocks.
    name, theirs = f"swin_{model}_patch4_window7_224_token", tmp_path / "theirs.json"

    assert run(["config", "new", "--model", name, "--keep_ratio", "0.9", "--out", str(theirs)]) == 0

    config = load_config(theirs)
    assert len(prunefront.token_counts(config).blocks) == blocks
    assert [(site.block, site.op, site.keep_ratio) for site in config.sites] == [(b, "prune", 0.9) for b in (5, 6, 7)]
    assert config.options == {"attn_ratio": 1.0, "tie": "official"}


@pytest.mark.parametrize(
    ("spelling", "sentence"),
    [
        ("--keep_ratio 0.9 --attn_ratio 0.1", "Swin has no attention level, so attn_ratio has to be 1, but got 0.1"),
        ("--keep_ratio 9", "keep_ratio is a share of the tokens, above 0 and at most 1, but got 9"),
        ("--base_keep_rate 0.7", "Swin was pruned by trilevel alone, but got 'evit'"),
    ],
)
def test_a_spelling_that_swin_does_not_have_is_refused(
    spelling: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "new", "--model", "swin_tiny_patch4_window7_224", *spelling.split()]) == 2
    assert sentence in capfd.readouterr().err


def test_sites_can_be_spelled_one_by_one(capfd: pytest.CaptureFixture[str]) -> None:
    line = (
        "config new --model deit_small_patch16_224 --method ppt --option threshold=0 --site 3:pool_or_prune:remove=50 "
        "--site 6:pool_or_prune:keep-ratio=9e-1"
    )

    assert run(line.split()) == 0

    config = load_config(json.loads(capfd.readouterr().out))
    assert (config.sites[0].block, config.sites[0].remove, config.options["threshold"]) == (3, 50, 0)
    assert (config.sites[1].block, config.sites[1].keep_ratio) == (6, 0.9)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--method evit --at 3 --keep-ratio 0.7", "prune or fuse; choose one with --op"),
        ("--method evit --at 3 --op merge --keep-ratio 0.7", "no operation 'merge'"),
        ("--method evit --at 12 --op fuse --keep-ratio 0.7", "blocks 0 to 11"),
        ("--method evit --at 3 --op fuse --keep-ratio 1.5", "keep_ratio"),
        ("--method evit --at 3 --op fuse", "exactly one of --keep-ratio"),
        ("--method evit --op fuse", "Name the blocks"),
        ("--method nope --at 3 --remove 5", "Unknown method 'nope'"),
        ("--at 3 --remove 5", "Name the method"),
        ("--drop_loc 3,12", "blocks 0 to 11, but got 12"),
        ("--method evit --at 3 --r 8", "leave one out"),
        ("--method evit --at 3 --op fuse --keep-ration 0.7", "did you mean --keep-ratio or --keep-rate?"),
        ("--drop_loc -3", "blocks 0 to 11, but got -3"),
        ("--base_keep_rate 7", "keep_rate is a share of the tokens, above 0 and at most 1, but got 7"),
        ("--base_keep_rate nan", "keep_rate is a share of the tokens"),
        ("--method tome --at 3 --remove 8 --option prop_attn", "--option expects NAME=VALUE"),
        ("--method evit --site 3:fuse:keep=0.7", "sites.0.keep: no such field is known"),
        ("--method evit --site 3:fuse", "BLOCK:OP:AMOUNT=VALUE"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_a_sentence(
    line: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "new", "--model", "deit_small_patch16_224", *line.split()]) == 2
    assert sentence in capfd.readouterr().err


def test_show_counts_tokens_and_macs(tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = result(capfd, "config", "show", str(tiny_config))

    # 16 patches and the class token; at block 1 half of the 16 stay, and one fused token joins them.
    assert [(block["tokens_in"], block["tokens_out"]) for block in document["blocks"]] == [(17, 17), (17, 10), (10, 10)]
    assert document["macs"] < document["dense_macs"]
    assert run(["config", "show", str(tiny_config)]) == 0
    assert "fuse: 8 stay, 8 go" in capfd.readouterr().out


def test_published_lists_the_papers_schedules_and_writes_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed = result(capfd, "config", "published", "evit", "deit_small_patch16_224")
    name = next(iter(listed))

    assert run(["config", "published", "evit", "deit_small_patch16_224", name, "--out", str(tmp_path / "p.json")]) == 0
    assert load_config(tmp_path / "p.json") == load_config(listed[name])
    assert run(["config", "published", "evit", "deit_small_patch16_224", "nope"]) == 2
    capfd.readouterr()
    assert run(["config", "published", "evit", "vit_base_patch32_224"]) == 0
    assert "Nothing of evit was published for models like vit_base_patch32_224" in capfd.readouterr().err


def test_validate_names_the_file_that_is_wrong(
    tmp_path: Path, tiny_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": "prunefront/config/1", "model": {"name": "vit_tiny_patch16_224"}}')

    assert run(["config", "validate", str(tiny_config)]) == 0
    assert run(["config", "validate", str(tiny_config), str(broken)]) == 2
    assert "broken.json: method: Field required" in capfd.readouterr().err


def test_what_there_is_can_be_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert {"evit", "hybrid"} <= {method["name"] for method in result(capfd, "methods")}
    assert "deit_small_patch16_224" in result(capfd, "models", "deit")
    assert result(capfd, "models", "digit_vit_patch6_48")["patch_tokens"] == 64
    assert result(capfd, "devices")[0]["id"] == "cpu"
    assert "digit-scenes" in result(capfd, "data", "inspect")
    assert result(capfd, "data", "inspect", "digit-scenes")["num_classes"] == 10
    assert run(["models", "resnet50"]) == 2
    assert run(["data", "inspect", "imagefolder:nope"]) == 2


def test_eval_compares_with_the_dense_model_on_the_same_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    new = ["config", "new", "--model", "digit_vit_patch6_48", "--method", "evit", "--at", "1", "--op", "fuse"]
    assert run([*new, "--keep-ratio", "0.8", "--out", str(path)]) == 0

    document = result(
        capfd, "eval", str(path), "--dataset", "digit-scenes", "--num-images", "64", "--against-dense"
    )  # fmt: skip

    assert document["num_images"] == 64
    assert document["top1_ci"][0] <= document["top1"] <= document["top1_ci"][1]
    assert document["top1_delta"] == pytest.approx(document["top1"] - document["dense_top1"])
    assert run(["eval", "digit_vit_patch6_48", "--dataset", "digit-scenes", "--against-dense"]) == 2
    assert "is dense" in capfd.readouterr().err


def test_eval_asks_for_the_dataset_before_it_looks_for_weights(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "deit_small_patch16_224", "--dataset", "digit-scene"]) == 2
    assert "did you mean 'digit-scenes'?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("resnet18", "ResNet is not supported"),
        ("deit_tiny_patch16_224.nope", "Invalid pretrained tag (nope) for deit_tiny_patch16_224. Check"),
    ],
)
def test_eval_refuses_a_model_before_it_looks_for_weights(
    model: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prunefront.create_dense", lambda *args, **options: pytest.fail("looked for weights"))

    assert run(["eval", model, "--dataset", "digit-scenes"]) == 2
    assert sentence in capfd.readouterr().err


def test_measure_writes_what_it_prints(tmp_path: Path, tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "measured.json"

    document = result(capfd, "measure", str(tiny_config), "--batch-size", "2", "--out", str(out))

    assert json.loads(out.read_text()) == document
    dense, pruned = document["measurements"]
    assert (dense["label"], pruned["reference"]) == ("vit_tiny_patch16_224 (dense)", "vit_tiny_patch16_224 (dense)")
    assert pruned["speedup"] == pytest.approx(dense["median_ms"] / pruned["median_ms"])


def test_what_was_measured_is_shown_although_the_disk_is_full(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise FileWriteError(28, f"Could not write {path}: No space left on device.")

    monkeypatch.setattr("prunefront.files.write_atomic", full)
    capfd.readouterr()
    assert run(["measure", str(tiny_config), "--batch-size", "2", "--out", str(tmp_path / "m.json"), "--json"]) == 2
    shown = capfd.readouterr()
    assert len(json.loads(shown.out)["measurements"]) == 2
    assert "No space left on device." in shown.err


def test_a_device_that_is_not_here_is_refused(tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", str(tiny_config), "--device", "cuda:99"]) == 2
    assert run(["measure", str(tiny_config), "--device", "toaster"]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["table", "build", "digit_vit_patch6_48"], "latency_tables.build.build_table"),
        (["measure", "digit_vit_patch6_48"], "latency_tables.measure.measure_models"),
        (["search", "digit_vit_patch6_48", "--dataset", "digit-scenes"], "prunefront.cli.search.connect"),
    ],
)
@pytest.mark.parametrize("place", ["", "file/result.json"])
def test_a_result_that_could_not_be_written_is_refused_before_the_work(
    arguments: list[str], work: str, place: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setattr(work, lambda *args, **options: pytest.fail("worked for nothing"))

    assert run([*arguments, "--out", str(tmp_path / place)]) == 2
    shown = capfd.readouterr()
    assert f"{tmp_path / place} cannot be written: " in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_a_device_without_a_name_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["table", "import", "t.csv", "--model", "digit_vit_patch6_48", "--runtime", "eager", "--device-name", " "]
    assert run(line) == 2
    assert "give it a name" in capfd.readouterr().err


def test_entries_that_ran_out_of_memory_are_shown_and_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    csv, table, config = (str(tmp_path / name) for name in ("tiny.csv", "tiny.json", "tome.json"))
    lines = ["entry,tokens_in,tokens_out,batch_size,median_ms,iqr_ms,samples"]
    lines += [f"{half},{at},{at},2,{at}.5,0.25,30" for half in ("attention", "mlp") for at in (2, 65)]
    lines += ["block.tome.merge,65,40,2,out_of_memory,,"]
    Path(csv).write_text("\n".join(lines))
    line = ["table", "import", csv, "--model", "digit_vit_patch6_48", "--device-name", "phone", "--out", table]
    assert result(capfd, *line, "--runtime", "onnxruntime")["num_unfit_entries"] == 1
    assert run(["table", "show", table]) == 0
    shown = capfd.readouterr().out
    assert "1 out of memory: schedules that need those are refused" in shown
    row = next(line for line in shown.splitlines() if line.startswith("block.tome.merge"))
    assert row.split() == ["block.tome.merge", "65", "40", "–", "–", "0", "out", "of", "memory"]
    new = ["config", "new", "--model", "digit_vit_patch6_48", "--method", "tome", "--r", "4", "--out", config]
    assert run(new) == 0
    capfd.readouterr()
    assert run(["table", "predict", table, config]) == 2
    assert "Block 0 needs 'block.tome.merge' on 65 -> 61 tokens, which ran out of memory" in capfd.readouterr().err


@pytest.mark.slow
def test_a_table_is_built_shown_used_and_drawn(
    tmp_path: Path, tiny_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tiny.table.json"

    built = result(
        capfd, "table", "build", "vit_tiny_patch16_224", *TINY, "--batch-size", "2", "--out", str(table), *BESIDE_ALL
    )  # fmt: skip

    assert built["num_entries"] == len(result(capfd, "table", "show", str(table))["entries"])
    (predicted,) = result(capfd, "table", "predict", str(table), str(tiny_config))
    assert 0 < predicted["predicted_ms"] < 10 * predicted["dense_predicted_ms"]
    assert predicted["predicted_memory_mib"] > 0.3  # 95 thousand parameters of four bytes
    report = result(capfd, "table", "validate", str(table), "--schedules", "2", "--write", *BESIDE_ALL)
    assert report["num_schedules"] == 2
    assert run(["table", "plot", str(table), "--out", str(tmp_path / "table.png")]) == 0
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert run(["table", "show", str(table)]) == 0
    told = capfd.readouterr().out
    assert "mean absolute error" in told and "error of speed-ups" in told and "during the validation" in told
    assert not list(tmp_path.glob("*.partial"))


def test_a_built_table_says_which_entries_are_noisy_and_that_the_machine_changed_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    table = simple_table(canary_drift=0.4)
    reason = "after 3 attempts the interquartile range is 40% of the median"
    noisy = [entry.model_copy(update={"state": "noisy", "reason": reason}) for entry in table.entries[:7]]
    table = table.evolve(entries=(*noisy, *table.entries[7:]))
    asked: list[Any] = []

    def build(*_: Any, settings: Any, **__: Any) -> LatencyTable:
        asked.append(settings.patience)
        return table

    monkeypatch.setattr("latency_tables.build.build_table", build)
    out = tmp_path / "noisy.table.json"
    line = ["table", "build", "vit_tiny_patch16_224", "--out", str(out)]
    capfd.readouterr()
    assert run([*line, "--max-foreign-cores", "1.5"]) == 0
    shown = capfd.readouterr()
    assert f"Warning: attention 2 -> 2 is noisy: {reason}" in shown.err
    assert "Warning: 2 more of 20 entries are noisy" in shown.err
    assert "20, 7 of them noisy" in shown.out
    assert "moved by 40% during the build; build again on a steadier one" in shown.out
    assert load_table(out).canary_drift == 0.4
    assert run(line) == 0
    assert asked == [Patience(max_foreign_cores=1.5), Patience()]


@pytest.mark.parametrize("cores", ["-1", "inf", "nan"])
def test_what_no_others_can_take_is_refused(cores: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    line = ["table", "build", "vit_tiny_patch16_224", "--max-foreign-cores", cores]
    assert run([*line, "--out", str(tmp_path / "t.json")]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Tables of the tiny model that "come with prunefront", for this machine and for another, by device; the working
    folder is an empty one."""
    monkeypatch.setattr("latency_tables.shipped.DATA", tmp_path / "shipped")
    names = {}
    for device in (describe_device("cpu"), DEVICE):
        file = file_to_ship(simple_table(device=device))
        save_table(simple_table(device=device), file)
        names[device.name] = f"shipped:{file.parent.name}/{file.stem}"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return names


def test_shipped_tables_are_listed_with_the_device_that_they_fit(
    shipped: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = {row["name"]: row for row in result(capfd, "table", "list")}
    assert {row["device"]: name for name, row in rows.items()} == shipped
    assert rows[shipped[DEVICE.name]]["fits_device"] is None
    own = rows[shipped[describe_device("cpu").name]]
    assert (own["fits_device"], own["runtime"], own["dtype"], own["batch_size"]) == ("cpu", "eager", "fp32", 8)
    assert run(["table", "list"]) == 0
    assert DEVICE.name in capfd.readouterr().out


def test_no_shipped_tables_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latency_tables.shipped.DATA", tmp_path)
    assert result(capfd, "table", "list") == []
    assert run(["table", "list"]) == 0
    assert "`prunefront table build` makes one" in capfd.readouterr().err


def test_a_shipped_table_stands_for_a_file_by_its_name(
    shipped: dict[str, str], tiny_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = shipped[DEVICE.name]
    assert result(capfd, "table", "show", name)["device"]["name"] == DEVICE.name
    (row,) = result(capfd, "table", "predict", name, str(tiny_config))
    # Stem 5 ms, head 1 ms; attention of 17, 17 and 10 tokens at 2 ms, MLP of 17, 10 and 10 at 3 ms; 4 ms for fusing.
    assert row["predicted_ms"] == pytest.approx(5 + 1 + 2 * 44 + 3 * 37 + 4)
    assert result(capfd, "table", "push", name)["block_key"] == simple_table().block_key
    assert run(["table", "plot", name]) == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["vit_tiny_patch16_224-eager-fp32-b8.png"]


def test_a_validation_is_not_written_into_a_shipped_table(
    shipped: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latency_tables.validate.validate_table", lambda *args, **options: pytest.fail("worked"))
    assert run(["table", "validate", shipped[DEVICE.name], "--write"]) == 2
    assert "comes with prunefront, which is not written to; give a file" in capfd.readouterr().err


@pytest.fixture
def adaptive(tmp_path: Path) -> tuple[str, str, str]:
    """A table of the demo model, 5 ms a token in every block and 7 ms for a selection, batches of one; a config whose
    images keep counts of their own; and weights for it, with a random selector."""
    table, path, weights = (str(tmp_path / name) for name in ("table.json", "spvit.json", "spvit.safetensors"))
    halves = [f"{name},{at},{at},1,{ms * at},0.1,9" for name, ms in (("attention", 2), ("mlp", 3)) for at in (1, 65)]
    selections = [f"block.spvit.select,65,{at},1,{5 * at + 7},0.1,9" for at in (60, 20)]
    csv = tmp_path / "table.csv"
    csv.write_text("\n".join(["entry,tokens_in,tokens_out,batch_size,median_ms,iqr_ms,samples", *halves, *selections]))
    line = ["table", "import", str(csv), "--model", "digit_vit_patch6_48", "--device-name", "phone"]
    assert run([*line, "--runtime", "onnxruntime", "--out", table]) == 0
    line = ["config", "new", "--model", "digit_vit_patch6_48", "--method", "spvit", "--at", "2", "--op", "select"]
    assert run([*line, "--keep-ratio", "0.5", "--out", path]) == 0
    torch.manual_seed(0)
    prunefront.save_model(prunefront.create_model(path, pretrained=True), weights)
    return table, path, weights


def test_counts_of_real_images_give_the_spread_of_latency(
    adaptive: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    table, path, weights = adaptive
    images = ["--dataset", "digit-scenes", "--num-images", "40"]

    tokens = result(capfd, "eval", weights, *images)["tokens_out"]
    (row,) = result(capfd, "table", "predict", table, path, "--checkpoint", weights, *images)

    assert row["is_nominal"] is False
    assert row["distribution"]["num_batches"] == 40
    assert tokens["p50"][-1] < tokens["p95"][-1]  # the selector does decide per image
    # One selection: latency and tokens rise together, so their percentiles are those of the same images.
    assert row["distribution"]["p50_ms"] == pytest.approx(5 * sum(tokens["p50"]) + 7)
    assert row["distribution"]["p95_ms"] == pytest.approx(5 * sum(tokens["p95"]) + 7)
    assert row["predicted_ms"] == row["distribution"]["mean_ms"] == pytest.approx(5 * sum(tokens["mean"]) + 7)
    assert run(["table", "predict", table, path, "--checkpoint", weights, *images]) == 0
    assert f" {row['distribution']['p95_ms']:.3f} " in capfd.readouterr().out


def test_a_config_is_evaluated_with_the_trained_selectors_of_a_checkpoint(
    adaptive: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    _, path, weights = adaptive
    images = ["--dataset", "digit-scenes", "--num-images", "16", "--against-dense"]

    saved = result(capfd, "eval", weights, *images)
    assert result(capfd, "eval", path, "--checkpoint", weights, *images) == {**saved, "what": path}


def test_a_checkpoint_beside_a_saved_model_is_refused(
    adaptive: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    _, _, weights = adaptive
    capfd.readouterr()
    assert run(["eval", weights, "--checkpoint", "other.safetensors", "--dataset", "digit-scenes"]) == 2
    assert "is a saved model with weights of its own. Leave out --checkpoint" in capfd.readouterr().err


def test_learned_parts_in_weights_for_a_dense_model_are_named(
    adaptive: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    _, _, weights = adaptive
    capfd.readouterr()
    assert run(["eval", "digit_vit_patch6_48", "--checkpoint", weights, "--dataset", "digit-scenes"]) == 2
    assert "It is of a compressed model with learned parts: name its config" in capfd.readouterr().err


def test_without_images_a_latency_of_adaptive_counts_is_nominal(
    adaptive: tuple[str, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    table, path, weights = adaptive

    (row,) = result(capfd, "table", "predict", table, path)

    assert (row["is_nominal"], row["distribution"]) == (True, None)
    # 65 tokens in two blocks, then the class token, half of the patches and a package in four.
    assert row["predicted_ms"] == pytest.approx(5 * (2 * 65 + 4 * 34) + 7)
    assert run(["table", "predict", table, path]) == 0
    shown = capfd.readouterr()
    assert "(nominal)" in shown.out
    assert "Give --dataset and --checkpoint" in shown.err
    assert run(["table", "predict", table, path, "--checkpoint", weights]) == 2
    assert "Give --dataset and --checkpoint together" in capfd.readouterr().err


def test_doctor_finds_what_is_here(capfd: pytest.CaptureFixture[str]) -> None:
    checks = {check["name"]: check["state"] for check in result(capfd, "doctor")}

    assert checks["torch"] == checks["cpu"] == checks["data folder"] == checks["database"] == "ok"


def test_doctor_names_a_database_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRUNEFRONT_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")

    assert run(["doctor"]) == 1
    shown = capfd.readouterr()
    assert "127.0.0.1:1/nothing" in shown.out
    assert shown.err == "Error: 1 problem(s): database.\n"


@pytest.mark.parametrize("line", [
    "doctor", "db upgrade", "db backup copy.db", "serve --port 0 --no-controller", "controller",
    "jobs export-study 1 --storage sqlite:///study.db",
])  # fmt: skip
@pytest.mark.parametrize("url", [
    "postgresql://me:hunter2@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x?user=me&password=hunter2",
    "postgresql://me:my@hunter2@127.0.0.1:1/x", "postgresql://me:hunter2", "mysql://me:hunter2@127.0.0.1:1/x",
])  # fmt: skip
def test_no_command_shows_the_password_of_the_database(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    line: str,
    url: str,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("PRUNEFRONT_DATABASE_URL", url)
    # The controller is a program of its own, which here runs in the process of the tests.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    try:
        status: object = run(line.split())
    except SystemExit as end:  # the controller's: a sentence
        status = end.code
    shown = capfd.readouterr()
    assert status
    assert "hunter2" not in f"{status} {shown.out} {shown.err} {caplog.text}"


def test_the_database_is_made_and_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.sqlite3"

    assert run(["db", "backup", str(copy)]) == 2
    assert run(["db", "upgrade"]) == 0
    assert run(["db", "backup", str(copy)]) == 0

    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    connection.close()


def test_serve_refuses_an_address_that_everybody_reaches(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "there is no login" in capfd.readouterr().err
