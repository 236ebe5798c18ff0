"""Whatever happens to one rank, all of them end, and say why."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
from ranks import finish, free_ports, start

from flashmoe_mlx.distributed import expert_parallel, heartbeat, watchdog
from flashmoe_mlx.distributed.collectives import gather_json
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.placement import Placement
from flashmoe_mlx.loader import BUNDLED_MODEL

FAIL = Path(__file__).parent / "fail.py"
ENDED = 75


def fail(folder, way: str, **second: str):
    """Start two ranks, of which the second has other variables."""
    both = {"FLASHMOE_COLLECTIVE_TIMEOUT": "12", "FLASHMOE_KERNELS": "stock"}
    return start(folder, 2, [FAIL, BUNDLED_MODEL, way, 0], [both, both | second])


def until_answer(rank) -> None:
    """Wait until a rank has answered once."""
    while line := rank.stdout.readline():
        if line.startswith("ANSWER"):
            return
    raise AssertionError("the rank ended without an answer")


@pytest.mark.parametrize("way", ["shard", "pipeline"])
def test_a_failing_disk_ends_all_ranks_with_its_message(tmp_path, way):
    both = {"FLASHMOE_COLLECTIVE_TIMEOUT": "60", "FLASHMOE_KERNELS": "stock"}
    command = [FAIL, BUNDLED_MODEL, way]
    ranks = [*start(tmp_path, 2, [*command, 700], [both, both])]
    for rank, text in zip(ranks, finish(ranks), strict=True):
        assert rank.returncode == 1
        assert "rank 1: " in text and "(Input/output error); nothing was computed" in text


def test_a_stopped_rank_ends_the_others_and_then_itself(tmp_path):
    ranks = fail(tmp_path, "shard")
    until_answer(ranks[1])
    ranks[1].send_signal(signal.SIGSTOP)
    text = ranks[0].communicate(timeout=60)[0]
    assert ranks[0].returncode == ENDED
    assert "rank 1 was silent for" in text or "took more than 12 s" in text
    ranks[1].send_signal(signal.SIGCONT)
    finish(ranks[1:])
    assert ranks[1].returncode != 0


def test_a_killed_rank_ends_the_others(tmp_path):
    ranks = fail(tmp_path, "shard")
    until_answer(ranks[1])
    ranks[1].kill()
    text = ranks[0].communicate(timeout=60)[0]
    assert ranks[0].returncode in (1, ENDED)
    assert "another rank ended" in text or "rank 1 ended" in text
    finish(ranks[1:])


@pytest.mark.parametrize("variable, value, difference", [
    ("FLASHMOE_EXPERTS_PER_TOKEN", "2", "rank 1 has top-k = 2, but rank 0 has "),
    ("FLASHMOE_SHARDING", "exact", "rank 1 has sharding = exact, but rank 0 has auto"),
])  # fmt: skip
def test_ranks_that_differ_do_not_start(tmp_path, variable, value, difference):
    ranks = fail(tmp_path, "shard", **{variable: value})
    for rank, text in zip(ranks, finish(ranks), strict=True):
        assert rank.returncode == 1 and difference in text and "READY" not in text


def test_routers_that_differ_are_an_error(tmp_path):
    both = {"FLASHMOE_COLLECTIVE_TIMEOUT": "60", "FLASHMOE_KERNELS": "stock"}
    one, two = ([FAIL, BUNDLED_MODEL, "shard", reads] for reads in (0, -1))
    ranks = start(tmp_path, 2, one, [both, both], last=two)
    for rank, text in zip(ranks, finish(ranks), strict=True):
        assert rank.returncode == 1 and "TOKEN" not in text
        assert "the router of rank 1 chose other experts than that of rank 0" in text


@pytest.mark.parametrize("weights, parts", [
    ((1, 1), [range(0, 7, 2), range(1, 7, 2)]),
    ((3, 1), [range(5), range(5, 7)]),
    ((1, 2, 1), [range(2), range(2, 5), range(5, 7)]),
])  # fmt: skip
def test_each_expert_has_one_rank(weights, parts):
    found = [Placement(rank, weights).experts(7) for rank in range(len(weights))]
    assert found == parts
    assert sorted(e for part in found for e in part) == list(range(7))


@pytest.mark.parametrize("garbage", [[-1], [1 << 30], [4]])
def test_undefined_bytes_are_a_lost_connection(monkeypatch, garbage):
    """MLX's ring returns some after a connection was lost, instead of an error."""
    monkeypatch.setattr(
        mx.distributed,
        "all_gather",
        lambda x, group: mx.array(garbage) if x.ndim == 1 else mx.full(x.shape, 255, x.dtype),
    )
    with pytest.raises(FlashMoEError, match="another rank ended, or lost its connection"):
        gather_json(mx.distributed.init(), "fact")


@pytest.mark.parametrize("variable, value, address", [
    ("MLX_HOSTFILE", '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]', "10.0.0.2"),
    ("MLX_HOSTFILE", '["10.0.0.1:5000", "[fd00::2]:5000"]', "fd00::2"),
    ("MLX_JACCL_COORDINATOR", "127.0.0.1:5000", "127.0.0.1"),
    ("NCCL_HOST_IP", "127.0.0.1", "127.0.0.1"),
    ("NCCL_HOST_IP", "", None),
])  # fmt: skip
def test_a_ranks_address(monkeypatch, variable, value, address):
    monkeypatch.setenv(variable, value)
    assert heartbeat.address_of(1) == address


def test_a_neighbour_that_cannot_be_reached_is_named(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setattr(heartbeat, "gather_json", lambda group, own: [["127.0.0.1", port, ""]])
    with pytest.raises(FlashMoEError, match=f"next rank at 127.0.0.1:{port}.* a firewall"):
        heartbeat.Heartbeat(mx.distributed.init(), "127.0.0.1")


def test_the_watchdog_names_the_seconds_that_it_waited(monkeypatch):
    said = []
    monkeypatch.setattr(watchdog, "end_process", said.append)
    with watchdog.Watchdog(0.1, "rank 0 of 2").watching("loading", 3):
        time.sleep(1)
    assert "rank 0 of 2: loading took more than 0.3 s" in said[0]


def test_the_watchdog_waits_while_kernels_compile(monkeypatch):
    said = []
    monkeypatch.setattr(watchdog, "end_process", said.append)
    patient = watchdog.Watchdog(0.1, "rank 0 of 2", patience=10)
    with patient.watching("a forward pass"):
        patient.progress("layer 1")
        time.sleep(0.5)
    assert not said


LEAVES = """
import os, signal, sys, time
import mlx.core as mx
from flashmoe_mlx.distributed.expert_parallel import EXACT, ExpertParallel
group = mx.distributed.init()
ExpertParallel(group, EXACT, 60).compare({"host": "a"})
if group.rank() == 0:
    open(sys.argv[1], "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.001)
"""


def test_a_rank_that_leaves_notices_that_the_other_was_killed(tmp_path):
    ranks = start(tmp_path, 2, ["-c", LEAVES, tmp_path / "killed"])
    printed = finish(ranks)
    assert ranks[1].returncode == ENDED
    assert "rank 1 of 2: rank 0 ended; its own output may say why" in printed[1]


def test_ranks_that_leave_together_end_well(tmp_path):
    ranks = start(tmp_path, 2, ["-c", LEAVES.replace("os.kill(", "print("), tmp_path / "left"])
    printed = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], printed


def test_a_rank_ends_if_its_launcher_ended_before_the_watch_began():
    code = "from flashmoe_mlx.distributed.watchdog import Watchdog; import time\n"
    code += "Watchdog(60, 'rank 0 of 2'); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    rank.stdout.close()
    assert rank.wait(30) == ENDED


def test_an_error_of_a_servers_thread_ends_the_process(monkeypatch):
    said = []
    monkeypatch.setattr(expert_parallel, "end_process", said.append)
    parallel = expert_parallel.ExpertParallel(mx.distributed.init(), expert_parallel.EXACT, 60)

    def load():
        with contextlib.suppress(FlashMoEError), parallel.ending():
            raise RuntimeError("[ring] connection to a peer was lost")

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert "rank 0 of 1: another rank ended ([ring] connection to a peer was lost)" in said[0]
    load()
    assert len(said) == 1
