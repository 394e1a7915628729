"""What a person sees while a job runs."""

import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from orchestrator.progress import Pace, Plain, Silent, duration, figure
from orchestrator.terminal import Terminal, display


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(clock):
    stream = io.StringIO()
    shown = Plain(stream, clock=clock, heartbeat=3600)
    yield shown, stream
    shown.close()


def test_plain_lines_name_the_stage_its_figures_and_the_time_left(plain, clock):
    shown, stream = plain
    shown.say("Job reviews")
    shown.stage("train")
    shown.say("2 workers")
    for step in (1, 2, 3):
        shown.step(step, 5, loss=0.5 / step, rate="412 examples/s")
        clock.now += 10
    shown.stage("evaluate")
    clock.now += 0.5
    shown.close()
    assert stream.getvalue().splitlines() == [
        "Job reviews",
        "train",
        "  2 workers",
        "  train: 1/5 steps (20%), loss 0.5, 412 examples/s",
        "  train: 2/5 steps (40%), loss 0.25, 412 examples/s, 30 s left",
        "  train: 3/5 steps (60%), loss 0.1667, 412 examples/s, 20 s left",
        "train: done in 30 s",
        "evaluate",
        "evaluate: done in 0.5 s",
    ]
    assert shown.timings == {"train": 30.0, "evaluate": 0.5}


def test_plain_lines_are_few_when_steps_are_fast_and_the_last_is_always_there(plain, clock):
    shown, stream = plain
    shown.stage("train")
    for step in range(1, 1001):
        clock.now += 0.01
        shown.step(step, 1000)
    lines = [line for line in stream.getvalue().splitlines() if "steps" in line]
    assert 8 <= len(lines) <= 12
    assert lines[-1] == "  train: 1,000/1,000 steps (100%)"


def test_plain_lines_come_every_five_seconds_when_steps_are_slow(plain, clock):
    shown, stream = plain
    shown.stage("train")
    for step in range(1, 31):
        shown.step(step, 10_000)
        clock.now += 1
    assert len([line for line in stream.getvalue().splitlines() if "steps" in line]) == 6


def test_a_count_without_a_total_is_shown_as_it_is(plain):
    shown, stream = plain
    shown.stage("predict")
    shown.step(2985, None, "rows")
    assert "  predict: 2,985 rows\n" in stream.getvalue()


def test_control_characters_of_the_data_do_not_reach_the_screen(plain):
    shown, stream = plain
    shown.stage("prepare\x1b[2J")
    shown.warn("row 3: found '\x1b[31mred\x07'\nsecond line\r")
    shown.step(1, 2, "rows\x1b", name="a\x1bb")
    assert not re.search(r"[^\x20-\x7e\n]", stream.getvalue())
    assert "  warning: row 3: found ' [31mred '\n  second line" in stream.getvalue()


def test_a_silent_stage_still_says_that_it_goes_on():
    written = threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            if "so far" in text:
                written.set()
            return super().write(text)

    stream = Stream()
    with Plain(stream, heartbeat=0.05) as shown:
        shown.stage("deploy")
        assert written.wait(30)
    assert re.search(r"  deploy: \d\.\d s so far\n", stream.getvalue())


@pytest.mark.parametrize("broken", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_reader_that_went_away_does_not_stop_the_job(broken):
    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            raise broken

    with Plain(Stream()) as shown:
        shown.stage("train")
        shown.step(1, 2)
        shown.say("still here")
    assert list(shown.timings) == ["train"]


def test_no_standard_output_at_all():
    with Plain(None) as shown:
        shown.stage("train")
        shown.step(1, 1)


def test_a_stage_that_breaks_off_is_not_called_done(plain, clock):
    shown, stream = plain
    with pytest.raises(RuntimeError), shown:
        shown.stage("train")
        clock.now += 2
        raise RuntimeError
    assert stream.getvalue().endswith("train: stopped after 2.0 s\n")


def test_pace_starts_over_when_the_count_falls(clock):
    pace = Pace(clock)
    pace.at(0)
    assert pace.left(10) is None
    clock.now += 4
    pace.at(2)
    assert pace.left(10) == pytest.approx(16)
    clock.now += 6
    assert pace.left(10) == pytest.approx(10)
    clock.now += 100
    assert pace.left(10) == 0.0
    pace.at(1)
    assert pace.left(10) is None


def terminal(clock, width: int = 80) -> tuple[Terminal, io.StringIO]:
    stream = io.StringIO()
    return Terminal(stream, clock=clock, width=width, height=24, force_terminal=True, color_system=None), stream


def seen(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_terminal_keeps_a_tick_for_each_stage_and_its_words(clock):
    shown, stream = terminal(clock)
    with shown:
        shown.say("Job reviews")
        shown.stage("prepare")
        shown.say("2,985 rows")
        clock.now += 2.1
        shown.stage("train")
        shown.step(5, 10, loss=0.25)
        shown.step(3, 3, "validation batches")
        clock.now += 70
    lines = [line.rstrip() for line in seen(stream.getvalue()).splitlines()]
    assert lines.index("✓ prepare      2.1 s") < lines.index("✓ train        1 min 10 s")
    assert lines.index("    2,985 rows") == lines.index("✓ prepare      2.1 s") + 1
    assert lines[lines.index("✓ train        1 min 10 s") + 1] == "    5/10 steps (50%) · loss 0.25"


def test_the_moving_block_has_a_bar_the_figures_and_the_time_left(clock):
    shown, stream = terminal(clock)
    shown.stage("train")
    shown.step(0, 10, loss=1.0)
    clock.now += 5
    shown.step(5, 10, loss=0.25, rate="412 examples/s")
    shown._live.refresh()
    block = seen(stream.getvalue())
    shown.close()
    assert "5/10 steps (50%) · 5.0 s left" in block and "━" in block
    assert "loss 0.25 · 412 examples/s" in block


def test_a_broken_off_stage_has_a_cross(clock):
    shown, stream = terminal(clock)
    with pytest.raises(RuntimeError), shown:
        shown.stage("train")
        raise RuntimeError
    assert "✗ train" in stream.getvalue()


def test_markup_in_the_data_is_text(clock):
    shown, stream = terminal(clock)
    with shown:
        shown.stage("prepare")
        shown.say("found [bold red]x[/] and [/nope]")
    assert "found [bold red]x[/] and [/nope]" in seen(stream.getvalue())


def test_drawing_and_telling_at_once_does_not_lock_up(clock):
    shown, _ = terminal(clock)
    done = threading.Event()

    def tell() -> None:
        for number in range(30):
            shown.stage(f"stage {number}")
            for step in range(5):
                shown.step(step, 5)
                shown.say("x")
        done.set()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    while not done.is_set() and teller.is_alive():
        shown._live.refresh()
    assert done.wait(30)
    shown.close()


def test_on_a_real_terminal_the_display_moves_and_redirected_output_does_not_disturb_it(tmp_path):
    """Standard output goes to a file meanwhile, as in an embedded cluster's session; the display stays on the terminal."""
    script = f"""
import os
from orchestrator.terminal import Terminal, display
with display() as shown:
    assert isinstance(shown, Terminal)
    os.dup2(os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_CREAT), 1)
    shown.stage("train")
    os.write(1, b"chatter")
    shown.step(1, 2)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"})
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait(30) == 0
    os.close(ours)
    assert "✓" in text.decode() and b"chatter" not in text
    assert (tmp_path / "log").read_bytes() == b"chatter"
    assert text.endswith(b"\x1b[?25h") or b"\x1b[?25h" in text  # the cursor is back


@pytest.mark.parametrize("options", [{}, {"json": True}, {"verbose": True}])
def test_elsewhere_the_display_is_plain(options, capfd):
    with display(**options) as shown:
        assert isinstance(shown, Plain)
        shown.say("hello")
    out, err = capfd.readouterr()
    assert (err if options.get("json") else out) == "hello\n"


def test_silence_is_a_display_too():
    shown = Silent()
    shown.stage("a")
    shown.say("b")
    shown.warn("c")
    shown.step(1, 2, loss=3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2985, "2,985"), (0.31271, "0.3127"), (3e-5, "3e-05"), (12345.6, "12,346"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_figures(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (2.14, "2.1 s"), (42.4, "42 s"), (59.7, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
