# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: it refuses what is wrong, survives what fails, and computes its ratios from the samples."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitmill import timing
from problems import CONVS, HEADLINE, Problem

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import families, gpu, peaks, peers, plots, report, runner, shapes  # noqa: E402
from benchmarks.__main__ import main, parse, workload  # noqa: E402
from benchmarks.attention import ATTENTION  # noqa: E402
from benchmarks.runner import Case, Family, Missing, Prepared, Row, Unfit, Variant  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy test machine must not decide what these tests see; those about interruptions set their own."""
    monkeypatch.setattr(timing, "preemptions", lambda: 0)


PROBLEM = Problem("small", 16, 8, 32)
PEAK = 1e-9  # seconds of one multiply-add


class StillPeaks:
    """Peaks that do not depend on the machine."""

    device, threads = "cpu", 1
    stopwatch = peaks.Peaks.stopwatch

    def sample(self, unit: str, size: int = 0) -> Callable[[], float]:
        return lambda: PEAK


def constant(name: str, seconds: float, baseline: str | None = None, **fields: object) -> Variant:
    """A variant that is right and says that it took `seconds`."""

    def build(case: Case) -> Prepared:
        prepared = Prepared(lambda: case.x, case.x, 0.0, 100, 28, None, "fp32", lambda: seconds)
        return dataclasses.replace(prepared, **fields)

    return Variant(name, build, "torch" if baseline else "bitmill", baseline)


def measure(*variants: Variant, problem: Problem = PROBLEM, macs: bool = True) -> dict[str, Row]:
    family = Family("family", "title", variants, macs)
    return {row.variant: row for row in runner.measure(family, problem, StillPeaks(), 0.001)}  # type: ignore[arg-type]


def test_numbers_follow_from_the_samples() -> None:
    rows = measure(constant("ours", 1e-3), constant("fp32", 4e-3, "fp32"), constant("bf16", 2e-3, "bf16"))
    row, macs, moved = rows["ours"], 16 * 8 * 32, 100 + 28 + 4 * 16 * 32
    assert (row.status, row.microseconds, row.low, row.high) == ("ok", 1000, 1000, 1000)
    assert row.samples + row.disturbed >= 31 and not row.cold and row.copies == 1
    assert (row.x_fp32, row.x_bf16, row.x_int8) == (4, 2, None)
    assert row.moved == moved and row.intensity == pytest.approx(macs / moved)
    assert row.gmacs == pytest.approx(macs / 1e-3 / 1e9) and row.gigabytes == pytest.approx(moved / 1e-3 / 1e9)
    assert row.percent_of_peak == pytest.approx(100 * macs * PEAK / 1e-3)
    assert rows["fp32"].x_fp32 == 1


def test_without_multiplications_bytes_are_held_against_a_copy() -> None:
    row = measure(constant("ours", 1e-3), macs=False)["ours"]
    assert (row.bound, row.gmacs, row.cold) == ("copy", None, False)
    assert row.percent_of_peak == pytest.approx(100 * row.moved * PEAK / 1e-3)


@pytest.mark.parametrize(
    ("change", "tolerance", "sentence"),
    [
        (lambda x: x + (torch.arange(x.numel()).view(x.shape) == 5), 0.0, "wrong: 1 of 512 results differ"),
        (lambda x: x * 1.01, 1e-3, "wrong: relative error 0.01, at most 0.001 allowed"),
        (lambda x: x * float("nan"), 1e-3, "wrong: relative error inf"),
        (lambda x: x[:-1], 0.0, "wrong: shape [15, 32], expected [16, 32]"),
    ],
)
def test_a_wrong_variant_is_refused(change, tolerance: float, sentence: str) -> None:
    calls = []

    def build(case: Case) -> Prepared:
        def call() -> torch.Tensor:
            calls.append(1)
            return change(case.x)

        return Prepared(call, case.x, tolerance, 0, 0, None, "fp32")

    rows = measure(Variant("bad", build), constant("good", 1e-3))
    assert rows["bad"].status.startswith(sentence)
    assert rows["bad"].microseconds is None and len(calls) == 1  # the check, and no timing
    assert rows["good"].status == "ok"


def test_within_the_tolerance_is_right() -> None:
    variant = Variant("close", lambda c: Prepared(lambda: c.x * 1.0001, c.x, 1e-3, 0, 0, None, "fp32"))
    assert measure(variant)["close"].status == "ok"


def test_what_fails_or_is_missing_does_not_stop_the_run() -> None:
    def missing(case: Case) -> Prepared:
        raise Missing("see there")

    def failing(case: Case) -> Prepared:
        raise OSError("no\nlibrary")

    def unfit(case: Case) -> Prepared:
        raise Unfit("k is odd")

    variants = (Variant("a", missing, "peer"), Variant("b", failing, "peer"), Variant("c", unfit, "peer"))
    rows = measure(*variants, constant("good", 1e-3))
    assert rows["a"].status == "not installed: see there"
    assert rows["b"].status == "failed: OSError: no library"
    assert rows["c"].status == "not for this problem: k is odd"
    assert rows["good"].status == "ok"


def cold_variant(copies_are_right: bool, called: list[int]) -> Variant:
    def prepare(case: Case, number: int) -> Prepared:
        def call() -> torch.Tensor:
            called.append(number)
            return case.x if copies_are_right or number == 0 else case.x + 1

        return Prepared(call, case.x, 0.0, 0, 80 << 20, lambda: prepare(case, len(set(called))), "fp32")

    return Variant("rotating", lambda case: prepare(case, 0))


def test_few_rows_rotate_over_copies_that_exceed_the_caches() -> None:
    called: list[int] = []
    row = measure(cold_variant(True, called), problem=Problem("one row", 1, 8, 32))["rotating"]
    assert row.status == "ok" and row.cold and row.copies == 3
    assert row.bound == "read" and row.percent_of_peak == pytest.approx(
        100 * (80 << 20) * PEAK / row.microseconds * 1e6
    )
    assert called[:3] == [0, 1, 2]  # every copy is verified
    timed = called[3:]
    assert all(b == (a + 1) % 3 for a, b in itertools.pairwise(timed))
    assert not measure(cold_variant(True, []))["rotating"].cold


def test_a_variant_that_was_always_interrupted_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = itertools.count()
    monkeypatch.setattr(timing, "preemptions", lambda: next(switches))
    rows = measure(constant("ours", 1e-3), constant("fp32", 4e-3, "fp32"))
    assert rows["ours"].status == runner.INTERRUPTED and rows["ours"].microseconds is None
    assert rows["ours"].disturbed >= 3 * 31 and report.disturbed(list(rows.values())) == 1


def test_no_ratio_between_one_in_cache_and_one_from_memory() -> None:
    fp32 = dataclasses.replace(cold_variant(True, []), baseline="fp32")
    rows = measure(fp32, constant("in cache", 1e-3), problem=Problem("one row", 1, 8, 32))
    assert rows["rotating"].x_fp32 == 1 and rows["in cache"].x_fp32 is None and not rows["in cache"].cold


def test_a_wrong_copy_is_refused() -> None:
    row = measure(cold_variant(False, []), problem=Problem("one row", 1, 8, 32))["rotating"]
    assert row.status.startswith("wrong:") and row.microseconds is None


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
@torch.inference_mode()
def test_every_variant_of_ours_verifies(family: Family) -> None:
    ours = tuple(v for v in family.variants if v.origin != "peer")
    layers = (Problem("even", 9, 32, 64), Problem("ugly", 10, 17, 33))
    attention = (Problem("even", 32, 128, 64), Problem("ugly", 7, 42, 33))  # 2 and 3 heads
    own = {"attention": attention, "conv": tuple(CONVS)}
    for problem in own.get(family.name, layers):
        rows = runner.measure(dataclasses.replace(family, variants=ours), problem, peaks.Peaks(1), 0.001)
        assert [row.status for row in rows] == ["ok"] * len(ours)
        assert all(row.microseconds > 0 and row.gigabytes > 0 for row in rows)


@pytest.mark.parametrize("family", gpu.FAMILIES, ids=lambda family: family.name)
@torch.inference_mode()
def test_every_variant_of_ours_for_a_gpu_verifies_here(family: Family) -> None:
    ours = tuple(v for v in family.variants if v.origin == "bitmill")
    assert (family.problems and len(ours) < len(family.variants)) or not family.macs
    for problem in (Problem("even", 17, 32, 64), Problem("ugly", 10, 17, 33)):
        rows = runner.measure(dataclasses.replace(family, variants=ours), problem, StillPeaks(), 0.001)  # type: ignore[arg-type]
        assert [row.status for row in rows] == ["ok"] * len(ours)
        assert {row.bound for row in rows} <= gpu.UNITS.keys()


def test_a_gpu_is_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--readme"])
    assert "runs on a GPU go without --readme" in capsys.readouterr().err
    options = parse(["--device", "cuda", "--family", "fp4", "--quick"])
    assert [problem.name for _, problem in workload(options)] == [problem.name for problem in gpu.GPU_CALLS]


def test_a_missing_peer_is_told_from_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Missing, match=r"requirements\.txt"):
        peers.load("no_such_engine.layers")
    (tmp_path / "broken_engine.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        peers.load("broken_engine")


def row(variant: str, status: str = "ok", family: str = "w1a1", **numbers: object) -> Row:
    return Row(family, "BERT-base projection", 128, 768, 768, variant, "bitmill", status, **numbers)  # type: ignore[arg-type]


ROWS = [
    row("binary", microseconds=137.94, low=130.0, high=150.0, x_fp32=12.04, gmacs=547.0, intensity=90.0, bound="fp32"),
    row("a name that is much too long for a narrow terminal", microseconds=1666.4, low=1.0, high=2.0, x_fp32=1.0),
    row("other", "not installed: see benchmarks/requirements.txt, which says how each of the engines is installed"),
    row("torch fp32", microseconds=1666.4, low=1600.0, high=1700.0, x_fp32=1.0, gmacs=45.0, intensity=20.0),
    row("no baseline", microseconds=200.0, low=90.0, high=110.0, gmacs=400.0, intensity=20.0),
    row("binary int8", family="w1a8", microseconds=100.0, low=90.0, high=110.0, gmacs=400.0, intensity=20.0),
]
FACTS = {
    "cpu": "A CPU", "threads": 1, "torch": "2.13.0", "bitmill": "0.1.0", "commit": "abc", "date": "2026-11-24",
    "command": "python -m benchmarks --readme", "peaks": dict.fromkeys(peaks.UNITS, 1e12),
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 140])
def test_table_is_aligned_and_fits(width: int) -> None:
    lines = report.table(families.FAMILIES[1], ROWS, width).splitlines()
    assert all(len(line) <= width for line in lines[1:])
    heads, binary = lines[1], lines[3]
    for head, value in (("us", "138"), ("x fp32", "12.04"), ("GMAC/s", "547")):
        assert heads.index(head) + len(head) == binary.index(value) + len(value)
    assert ("quartiles" in heads) == (width >= 120) and "128 x 768 x 768, BERT-base projection" in lines
    assert lines[5].startswith("  other: not installed: see benchmarks/requirements.txt")


def test_json_holds_everything() -> None:
    data = json.loads(json.dumps(report.as_json(FACTS, ROWS)))
    facts, rows = report.from_json(data)
    assert facts == FACTS and rows == ROWS
    assert report.from_json(data, data)[1] == ROWS + ROWS
    with pytest.raises(ValueError, match="must have the same threads"):
        report.from_json(data, {**data, "threads": 2})


def test_readme_section_is_replaced_and_nothing_else() -> None:
    section = report.markdown(FACTS, ROWS)
    assert "A CPU" in section and "`python -m benchmarks --readme`" in section and "2026-11-24" in section
    assert "| 128 x 768 x 768 | 1,666 |" in section and "12.0" in section
    peer = dataclasses.replace(ROWS[0], variant="engine", origin="peer", microseconds=400.0)
    assert "other engines" not in section
    assert "| binary 138 | 2.9 | engine 400 |" in report.markdown(FACTS, [*ROWS, peer])
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.rewrite_readme(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    for bad in ("nothing", text + text, f"{report.END}\n{report.BEGIN}"):
        with pytest.raises(ValueError, match="the README must have one"):
            report.rewrite_readme(bad, "new")


def test_the_readme_has_the_markers() -> None:
    report.rewrite_readme((REPOSITORY / "README.md").read_text(), "new")


def test_plots(tmp_path: Path) -> None:
    paths = plots.write(FACTS, ROWS, tmp_path / "new")
    assert [path.name for path in paths] == ["roofline.png", "speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert plots.write(FACTS, ROWS[2:3], tmp_path) == []
    figure = plots.speedup(FACTS, [ROWS[0], dataclasses.replace(ROWS[0], family="attention", m=7)])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["128 x 768 x 768"]  # which has bars


def test_families_get_their_own_problems() -> None:
    for arguments, family, names in (
        (["--family", "attention", "--model", "DeiT"], "attention", {"DeiT-S attention", "DeiT-B attention"}),
        (["--family", "conv", "--model", "ViT-S"], "conv", {"ViT-S patch embedding 16 x 16"}),
        (["--family", "w1a1", "--model", "TinyBERT"], "w1a1", {"TinyBERT-4L-312 projection"}),
        (["--family", "attention", "--shape", "7,42,33"], "attention", {"given"}),
    ):
        work = workload(parse(arguments))
        assert {(f.name, problem.name) for f, problem in work} == {(family, name) for name in names}
    rows = runner.measure(
        dataclasses.replace(families.FAMILIES[0], variants=ATTENTION[:1]),
        Problem("layer", 8, 8, 8),
        peaks.Peaks(1),
        0.001,
    )
    assert rows[0].status == "not for this problem: n must be 2 x heads x m"


def test_shapes_are_those_of_the_tests() -> None:
    assert shapes.select(None, None) == HEADLINE
    assert shapes.select(None, (128, 768, 768))[0].name == "BERT-base projection"
    assert shapes.select(None, (5, 6, 7)) == (Problem("given", 5, 6, 7),)
    assert {p.name for p in shapes.select("tinybert", None)} == {"TinyBERT-4L-312 projection"}
    with pytest.raises(ValueError, match="no model's name contains 'GPT-9'"):
        shapes.select("GPT-9", None)


def test_several_threads_are_held_against_one_in_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StillPeaks, "threads", 2)
    shared = constant("shared", 0.0, sample=lambda: 1e-3 * (1.0 if torch.get_num_threads() == 1 else 0.6))
    peer = dataclasses.replace(constant("other", 1e-3), origin="peer")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rows = measure(shared, peer)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert rows["shared"].microseconds == pytest.approx(600) and rows["other"].x_one_thread is None
    assert rows["shared"].x_one_thread == pytest.approx(1 / 0.6)
    for several in (True, False):
        lines = report.table(families.FAMILIES[1], [*ROWS, *rows.values()] if several else ROWS, 80).splitlines()
        assert ("x one thread" in lines[1]) == several and all(len(line) <= 80 for line in lines[1:])
    assert measure(shared)["shared"].x_one_thread is not None
    monkeypatch.setattr(StillPeaks, "threads", 1)
    assert measure(shared)["shared"].x_one_thread is None


def test_peaks_of_several_threads_add_up() -> None:
    one, two = peaks.Peaks(1), peaks.Peaks(2)
    for unit in peaks.UNITS:
        assert one.rate(unit, 1 << 16) >= 0 and two.rate(unit, 1 << 16) >= 0
        assert one.sample(unit, 1 << 16)() >= 0
    assert one.rate("read") > 1e8 and one.rate("copy") > 1e8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--family", "int3"], "no family is called 'int3'; known: product, w1a1"),
        (["--model", "GPT-9"], "no model's name contains 'GPT-9'"),
        (["--shape", "0,1,1"], "every size of M,N,K must be at least 1"),
        (["--shape", "1,1,1", "--model", "BERT"], "give --shape or --model, not both"),
        (["--seconds", "0"], "expected more than 0"),
        (["--threads", "1024"], "CPU(s), got 1024"),
        (["--load", "no-such-file.json"], "No such file"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_command_times_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, file = torch.get_num_threads(), tmp_path / "run.json"
    for name in ("OMP_NUM_THREADS", "BNN_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    command = ["--quick", "--family", "w1a1", "--shape", "9,32,64", "--json", str(file)]
    try:
        assert main(command) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "9 x 32 x 64, given" in printed and "binary, zero=plus" in printed
    data = json.loads(file.read_text())
    assert {"cpu", "date", "commit", "torch", "threads", "peaks"} <= data.keys()
    assert data["command"] == "python -m benchmarks --family w1a1 --shape 9,32,64 --quick"
    assert all(entry["status"] == "ok" and entry["x_fp32"] > 0 for entry in data["rows"])
    assert main(["--load", str(file)]) == 0
    assert capsys.readouterr().out == printed


def test_a_wrong_variant_of_ours_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in (("ok", 0), ("wrong: 1 of 2 results differ", 1)):
        file = tmp_path / "run.json"
        file.write_text(json.dumps(report.as_json(FACTS, [row("binary", status)])))
        assert main(["--load", str(file)]) == code


def test_the_readme_needs_a_quiet_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    monkeypatch.setattr(report, "write_readme", written.append)
    monkeypatch.setattr(plots, "write", lambda facts, rows, folder, names: written.append(folder.name))
    file = tmp_path / "run.json"
    for disturbed, code in ((0, 0), (9, 1)):
        rows = [dataclasses.replace(r, samples=31, disturbed=disturbed) for r in ROWS]
        file.write_text(json.dumps(report.as_json(FACTS, rows)))
        assert main(["--load", str(file), "--readme"]) == code
    assert len(written) == 2 and written[0] == "plots" and "| 128 x 768 x 768 |" in written[1]
    assert "must come from a quiet machine" in capsys.readouterr().err


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--readme" in done.stdout
