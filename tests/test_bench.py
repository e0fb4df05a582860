# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench` and the timing that it shares with the benchmarks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bitmill import cli, timing
from bitmill.bench import layers as bench
from bitmill.nn import PackedFP4Linear


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy test machine must not decide what these tests see; those about interruptions set their own."""
    monkeypatch.setattr(timing, "preemptions", lambda: 0)


def test_interleave_takes_turns_and_skips_rounds_for_slow_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def sample(name: str, cost: float) -> timing.Sample:
        def run() -> float:
            order.append(name)
            now[0] += cost
            return {"a": 3.0, "b": 5.0}[name]

        return run

    spreads = timing.interleave({"a": sample("a", 0.0), "b": sample("b", 0.02)}, seconds=0.1)
    # warm-up, a full round, then b waits
    assert order[:2] == ["a", "b"] and sorted(order[2:4]) == ["a", "b"] and order[4:6] == ["a", "a"]
    assert order.count("a") >= 1 + timing.ROUNDS and 6 <= order.count("b") < order.count("a") / 3
    assert spreads["a"][:3] == (3.0, 3.0, 3.0) and spreads["b"].median == 5.0


def test_interleave_changes_the_order_but_takes_each_once_a_round() -> None:
    order: list[str] = []
    timing.interleave({name: lambda name=name: order.append(name) or 1e-3 for name in "abc"}, seconds=1e-3)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"} and len(set(rounds)) == 6


def test_disturbed_samples_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([0, 1, 1, 1, 1, 1])
    monkeypatch.setattr(timing, "preemptions", lambda: next(switches))
    seconds = iter([0.09, 0.002, 0.003])
    taken = timing.Taken()
    taken.add(lambda: next(seconds))
    taken.add(lambda: next(seconds))
    assert taken.clean == [0.002, 0.003] and taken.disturbed == [0.09]
    assert taken.spread() == timing.Spread(0.0025, 0.00175, 0.00325, 2, 1)


def test_a_long_sample_may_be_interrupted_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 % of its time: otherwise calls of seconds would never be measured beside anything."""
    switches = iter([0, 11, 11, 21])
    monkeypatch.setattr(timing, "preemptions", lambda: next(switches))
    taken = timing.Taken()
    taken.add(lambda: 2.0)
    assert taken.clean == [2.0] and taken.disturbed == [2.0]


def test_a_long_call_is_not_warmed_up() -> None:
    calls: list[int] = []
    for once, runs in ((timing.LONG * 1.5, 1), (timing.LONG / 2, 2)):
        sample = timing.stopwatch(lambda once=once: calls.append(1) or timing.time.sleep(once))
        calls.clear()
        assert sample() >= once and len(calls) == runs


def test_spread_without_a_clean_sample_uses_what_there_is() -> None:
    taken = timing.Taken()
    with pytest.raises(ValueError, match="at least one sample"):
        taken.spread()
    taken.disturbed.append(4.0)
    assert taken.spread() == timing.Spread(4.0, 4.0, 4.0, 0, 1)


def test_stopwatch_repeats_short_calls_and_rotation_goes_around() -> None:
    calls: list[int] = []
    sample = timing.stopwatch(timing.rotated([lambda i=i: calls.append(i) for i in range(3)]))
    assert sample() > 0
    assert len(calls) > 100 and calls[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_copies_exceed_the_caches() -> None:
    for size in (1, 4096, 1 << 20, timing.COLD_BYTES, 1 << 30):
        assert size * timing.copies_for(size) > timing.COLD_BYTES >= size * (timing.copies_for(size) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 48, 64), (1, 33, 65)])
def test_every_kind_is_measured(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 1 << 15)
    result = bench.run(shape=shape, dtype=dtype, seconds=0.01)
    assert result["cold"] == (shape[0] == 1) and result["threads"] == torch.get_num_threads()
    assert [row["kind"] for row in result["layers"]] == list(bench.KINDS)
    for row in result["layers"]:
        assert row["microseconds"] > 0 and row["low"] <= row["microseconds"] <= row["high"]
        ratio = result["linear_float32_microseconds"] / row["microseconds"]
        assert row["x_float32"] == pytest.approx(ratio)
        assert row["float32_bytes"] == 4 * shape[1] * shape[2]
        assert row["verdict"].startswith(f"{row['kind']} ") and row["verdict"].endswith(".")
    text = bench.render(result)
    assert ("from memory" in text) == result["cold"]
    assert all(len(line) <= 80 or line.endswith(".") or " x weight " in line for line in text.splitlines())


def test_bytes_are_those_of_the_packed_layer() -> None:
    (row,) = bench.run(("fp4",), (9, 48, 64), seconds=0.01)["layers"]
    assert row["weight_bytes"] == 48 * 64 // 2 + 4 * 48


@pytest.mark.parametrize(
    ("to_float32", "to_bfloat16", "words"),
    [
        (12.0, 6.0, "pays off here: 12.0 times faster than float32 and 6.0 times faster than bfloat16"),
        (1.0, 0.5, "saves memory here (32 times), not time: as fast as float32 and 2.0 times slower than bfloat16"),
        (3.0, 0.5, "depends on what you have: 3.0 times faster than float32 and 2.0 times slower than bfloat16"),
    ],
)
def test_verdict(to_float32: float, to_bfloat16: float, words: str) -> None:
    assert words in bench.verdict("binary", to_float32, to_bfloat16, 32.0)


def test_relative_error() -> None:
    one, zero = torch.ones(2), torch.zeros(2)
    assert bench.relative_error(one, one) == 0 and bench.relative_error(zero, zero) == 0
    assert bench.relative_error(2 * one, one) == pytest.approx(1.0)
    assert bench.relative_error(one, zero) == float("inf")
    assert bench.relative_error(one * float("nan"), one) == float("inf")


def test_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "--layer", "binary", "--shape", "9,48,64", "--threads", "1"]) == 0
        assert "Linear float32" in (text := capsys.readouterr().out) and "binary " in text and "1 thread(s)" in text
        command = ["bench", "--layer", "mxfp4", "--shape", "9,48,64", "--dtype", "bfloat16", "--json"]
        assert cli.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["cpu"] == cli.cpu_name() and result["shape"] == [9, 48, 64] and result["dtype"] == "bfloat16"
    assert [row["kind"] for row in result["layers"]] == ["mxfp4"]


def test_command_knows_every_kind() -> None:
    assert tuple(bench.KINDS) == cli.LAYER_KINDS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "0,768,768"], "every size of M,N,K must be at least 1, got 0,768,768"),
        (["--shape", "128,-1,768"], "every size"),
        (["--shape", "many"], "expected three whole numbers like 128,768,768, got 'many'"),
        (["--shape", "1,2"], "expected three whole numbers"),
        (["--shape", "1,2,3,4"], "expected three whole numbers"),
        (["--shape", "1.5,2,3"], "expected three whole numbers"),
        (["--shape", "9999999999,9999999999,9999999999"], "at most 268,435,456 elements"),
        (["--shape", f"{'9' * 5000},1,1"], "expected three whole numbers"),
        (["--layer", "int3"], "invalid choice: 'int3'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--threads", "0"], "expected a whole number from 1 to 1024, got '0'"),
        (["--threads", "some"], "expected a whole number from 1 to 1024, got 'some'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = PackedFP4Linear.forward
    monkeypatch.setattr(PackedFP4Linear, "forward", lambda self, x: right(self, x) * 1.001)
    assert cli.main(["bench", "--layer", "fp4", "--shape", "9,48,64"]) == 1
    assert "the packed fp4 layer differs from its training form by 0.001" in capsys.readouterr().err
