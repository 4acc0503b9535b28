"""What a run shows on a terminal: one changing line that fits; and elsewhere plain lines."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, free_port, quick, started
from terminals import Terminal

import engine
import main
import progress
import terminal
from progress import Progress, fitted

# these models are so small that a second thread only waits
pytestmark = pytest.mark.usefixtures("one_thread")

BAR = re.compile(r"\[[#-]+\]")


def run_on(screen, monkeypatch, **options):
    """A run of this process on a terminal; returns its exit code and the rows that it leaves."""
    with open(os.dup(screen.slave), "w", buffering=1) as out, open(os.dup(screen.slave), "w", buffering=1) as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "PAUSE", 0.0)
        # 5 updates an epoch
        code = main.main(quick(batch_size=256, **options))
        monkeypatch.undo()
    return code, screen.close()


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_one_line_while_training(columns, monkeypatch):
    screen = Terminal(columns)
    epochs = 2 if columns == 80 else 1
    code, rows = run_on(screen, monkeypatch, epochs=epochs)
    assert code == 0
    finished = [row for row in rows if row.startswith("epoch ")]
    assert [row.split(" [")[0] for row in finished] == [f"epoch {epoch + 1}/{epochs}" for epoch in range(epochs)]
    # nothing wrapped, and the bar of the evaluation gave way to its result
    after = [rows[rows.index(row) + 1] for row in finished]
    assert all(row.startswith("* Acc@1 ") for row in after) and not any("evaluation" in row for row in rows)
    for seen in screen.seen:
        bars = [row for row in seen if BAR.search(row)]
        done = sum(" 5/5" in bar for bar in bars)
        assert len(bars) - done <= 1 and len(bars) <= epochs + 1, seen
    changing = {row for seen in screen.seen for row in seen if BAR.search(row)}
    assert sum("evaluation" in row for row in changing) >= 1
    assert max(map(len, changing)) < columns and len(changing) > 7
    # what there is room for
    told = {40: ("loss",), 80: ("loss", "left"), 120: ("images/s", "lr", "memory"), 200: ("temperature", "grad_norm")}
    assert any(all(part in row for part in told[columns]) for row in changing if row.startswith("epoch ")), changing


def test_a_terminal_that_is_resized(monkeypatch):
    screen, evaluate, sizes = Terminal(120), engine.evaluate, [60, 100]

    def resized(*arguments, **options):
        result = evaluate(*arguments, **options)
        # wait until the result is on the screen, which the next bar follows
        time.sleep(0.2)
        screen.resize(sizes.pop(0))
        return result

    monkeypatch.setattr(engine, "evaluate", resized)
    code, rows = run_on(screen, monkeypatch, epochs=2)
    assert code == 0 and not sizes
    bars = [[row for row in seen if row.startswith("epoch 2/2")] for seen in screen.seen]
    assert {len(found) for found in bars} == {0, 1}
    assert max(len(row) for found in bars for row in found) in range(40, 60)
    assert [row.split(" [")[0] for row in rows if row.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]


def test_other_text_takes_the_place_of_the_line(monkeypatch):
    """A warning in the middle of an epoch is a line of its own, and the bar goes on below."""
    screen, to_device, calls = Terminal(80), engine._to_device, []

    def warns(*arguments):
        calls.append(1)
        if len(calls) == 3:
            print("warning: in between", file=sys.stderr, flush=True)
        return to_device(*arguments)

    monkeypatch.setattr(engine, "_to_device", warns)
    code, rows = run_on(screen, monkeypatch, epochs=1)
    assert code == 0
    at = rows.index("warning: in between")
    assert rows[at + 1].startswith("epoch 1/1 [") and not any(BAR.search(row) for row in rows[:at])


def test_dumb_terminals_and_files_get_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal(80)
    with open(os.dup(screen.slave), "w", buffering=1) as out:
        assert not terminal.is_terminal(out)
        monkeypatch.setenv("TERM", "xterm")
        assert terminal.is_terminal(out)
    screen.close()
    assert not terminal.is_terminal(None) and not terminal.is_terminal(out)
    shown = Progress("epoch 1/3", 4, 10, torch.device("cpu"), epochs_left=2)
    shown.update(1)
    shown.update(2, {"loss": 0.7, "lr": 0.2})
    shown.update(2, {"loss": 0.5, "lr": 0.1}, lasting=True)
    shown.close(keep=True)
    assert re.fullmatch(
        r"epoch 1/3 2/4  loss 0.5  left 0:00:00  \d+ images/s  lr 0.1  memory \d+ MiB  left of epoch 0:00:00\n",
        capsys.readouterr().out,
    )


def test_time_left_of_the_run(monkeypatch, capsys):
    """Half of the first of three epochs took 50 s, and what comes between two epochs takes 7 s."""
    clock = iter([0.0, 50.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    shown = Progress("epoch 1/3", 10, 10, torch.device("cpu"), epochs_left=2, between=7.0)
    shown.update(5, {"loss": 0.5}, lasting=True)
    text = capsys.readouterr().out
    # 50 + 7 and twice 100 + 7
    assert "left 0:04:31  1 images/s" in text and "left of epoch 0:00:50" in text


@pytest.mark.parametrize("room", [1, 9, 20, 39, 79, 200])
def test_a_line_is_cut_to_its_room(room):
    parts = ["loss 2.314", "left 0:10:00", "1000 images/s"]
    for done in (0, 5, 10, 11):
        line = fitted("epoch 10/300", done, 10, parts, room)
        assert len(line) <= room and line.startswith("epoch 10/300 "[:room])
    assert all(part in fitted("epoch 10/300", 5, 10, parts, 200) for part in parts)


def test_last_lines_say_where_things_are(tmp_path, capsys):
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    last = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[-6:])
    best = tmp_path / "checkpoint-best.pth"
    assert last == {
        "log": f"{tmp_path / 'log.txt'} (a line an epoch; the first is 0)", "curves": str(tmp_path / "curves.png"),
        "report": str(tmp_path / "report.html"), "best": str(best),
        "evaluate": f"python main.py --eval true --resume {best}",
        "predict": f"python scripts/predict.py {best} IMAGES",
    }  # fmt: skip
    # the command works as it stands
    assert main.main(last["evaluate"].split()[2:]) == 0
    assert "* Acc@1 " in capsys.readouterr().out
    assert main.main(quick(epochs=1)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "saved        nothing, since there is no --output_dir"


def test_ctrl_c_ends_with_one_line(tmp_path):
    """Typed into the terminal: the bar gives way to one line that says how to go on."""
    screen = Terminal(80)
    command = [sys.executable, str(ROOT / "main.py"), *quick(epochs=50, output_dir=tmp_path)]
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen.slave)
    environment = {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    with started([sys.executable, "-c", code, *command], environment, start_new_session=True, **streams) as process:
        deadline = time.monotonic() + 60
        while b"epoch 2/50 [" not in screen.text and time.monotonic() < deadline:
            time.sleep(0.05)
        os.write(screen.master, b"\x03")
        assert process.wait(30) == 130
    rows = screen.close()
    at = next(index for index, row in enumerate(rows) if "stopped by SIGINT" in row)
    assert rows[at].startswith("stopped by SIGINT: saved ") and not any("Traceback" in row for row in rows)
    # the bars of whole epochs stay, that of the broken one does not
    assert all(re.search(r" (\d+)/\1 ", row) for row in rows if BAR.search(row))


@pytest.mark.slow
def test_several_processes_show_one_bar(tmp_path):
    screen = Terminal(100)
    starter = ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command = [sys.executable, *starter, f"--master_port={free_port()}", str(ROOT / "main.py"), *quick(epochs=2)]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TERM": "xterm"}
    with started(command, environment, stdin=subprocess.DEVNULL, stdout=screen.slave, stderr=screen.slave) as process:
        assert process.wait(180) == 0
    rows = screen.close()
    assert [row.split(" [")[0] for row in rows if BAR.search(row)] == ["epoch 1/2", "epoch 2/2"]
    bars = [[row for row in seen if BAR.search(row)] for seen in screen.seen]
    assert all(sum(not re.search(r" (\d+)/\1 ", row) for row in found) <= 1 for found in bars)


def test_last_lines_of_the_installed_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernelwarehouse train"])
    folder = tmp_path / "with a space"
    assert main.main(quick(epochs=1, output_dir=folder, log_dir=tmp_path / "tb", disable_eval=True)) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[-6:])
    # nothing was evaluated, so that no checkpoint is the best
    assert lines["last"] == str(folder / "checkpoint-0.pth")
    assert lines["evaluate"] == f"kernelwarehouse evaluate --resume '{folder / 'checkpoint-0.pth'}'"
    assert lines["predict"] == f"kernelwarehouse predict '{folder / 'checkpoint-0.pth'}' IMAGES"
    assert lines["TensorBoard"] == f"tensorboard --logdir {tmp_path / 'tb'}"


def test_a_closed_standard_output(tmp_path, monkeypatch):
    """As the shell's >&- makes it."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main.main(quick(epochs=1, output_dir=tmp_path)) == 0
    assert (tmp_path / "checkpoint-0.pth").is_file()
