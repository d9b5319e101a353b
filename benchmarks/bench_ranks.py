"""Two processes on one ranking against one: how much faster, what they send, and how fast pieces of weights move.

    python benchmarks/bench_ranks.py [--rounds N] [--matrices N] [--output FILE]

Both processes have one thread. The checkpoint has 200 matrices that take one thread some ten seconds in all, and its
file lies in memory, so that computing is what takes the time. In turn one process ranks it alone while the other
sleeps, and both rank it together; the time is that of the call of rank(), the longer one of the two. The machine needs
two idle cores, since wall clock is what is compared. ``queued`` says for how many seconds the threads of both had to
wait for a processor (Linux only); rounds with more than a tenth of it are kept but do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
import torch
import torch.multiprocessing as processes
import workloads

import kappa_fast

SHAPES = ((1024, 512), (768, 768), (1024, 768), (512, 1024))  # in turn
PIECE = 64 << 20  # bytes that one rank asks another for
PIECES = 8
TIMEOUT = 120.0
DISTURBED = 0.1  # of the time of both together
MOST = 3  # times as many rounds as are wanted


def checkpoint(file: Path, matrices: int) -> None:
    """Matrices in bfloat16 with trained-like spectra."""
    from safetensors.torch import save_file

    made = [workloads.weights(*SHAPES[i % len(SHAPES)], "trained", i).bfloat16() for i in range(len(SHAPES))]
    save_file({f"layers.{i}.weight": made[i % len(made)] * (1 + i) for i in range(matrices)}, file)


def work(rank: int, port: int, file: str, orders: Connection) -> None:
    """One of the two processes: does what it is told, and says what it took."""
    import torch.distributed as distributed

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    kappa_fast.rank({"warm": torch.randn(64, 48)})
    while (order := orders.recv()) != "end":
        if order == "move":
            orders.send(moved(rank))
            continue
        group = distributed.group.WORLD if order == "together" else None
        started, busy, queued = time.perf_counter(), time.process_time(), queue()
        ranking = kappa_fast.rank(file, process_group=group)
        seconds, busy, queued = time.perf_counter() - started, time.process_time() - busy, queue() - queued
        ranks = [dict(each) for each in ranking.metadata.get("ranks", ())]
        orders.send((seconds, busy, queued, ranks, [repr(entry) for entry in ranking]))
    distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo may still hold a tensor


def moved(rank: int) -> float:
    """Bytes a second at which rank 0 gets pieces of rank 1, from memory to memory."""
    from kappa_fast.distributed.line import Line
    from kappa_fast.distributed.ranks import _store_of
    from kappa_fast.distributed.transfer import Transfer

    store = _store_of(torch.distributed.group.WORLD)
    there = torch.ones(PIECE, dtype=torch.uint8)
    line = Line(torch.distributed.PrefixStore("bench", store), rank, 2, TIMEOUT)
    transfer = Transfer(line, store, lambda name, box: there)
    rate = 0.0
    if rank == 0:
        transfer.fetch(1, "warm", (range(PIECE),))
        started = time.perf_counter()
        for _ in range(PIECES):
            transfer.fetch(1, "piece", (range(PIECE),))
            line.moved()
        rate = PIECES * PIECE / (time.perf_counter() - started)
    line.meet("done")
    transfer.close()
    line.close()
    return rate


class Pair:
    """Two processes with one thread each, and a process group between them."""

    def __init__(self, file: Path) -> None:
        context = processes.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [context.Pipe() for _ in range(2)]
        self._ends = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=work, args=(rank, port, str(file), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def ask(self, order: str, ranks: tuple[int, ...] = (0, 1)) -> list[Any]:
        """What these ranks answer."""
        for rank in ranks:
            self._ends[rank].send(order)
        return [self._ends[rank].recv() for rank in ranks]

    def end(self) -> None:
        """Both leave."""
        for end in self._ends:
            end.send("end")
        for process in self._processes:
            process.join()


def undisturbed(row: dict[str, Any]) -> bool:
    """Whether this is a round in which hardly any thread had to wait for a processor."""
    return "ratio" in row and not row["queued"] > DISTURBED * row["together"]


def measure(file: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each round, until there are enough undisturbed ones, and one for the moving of pieces."""
    pair, rows = Pair(file), list[dict[str, Any]]()
    for number in range(MOST * rounds):
        if sum(map(undisturbed, rows)) == rounds:
            break
        ((alone, busy, alone_queued, _, expected),) = pair.ask("alone", (0,))
        answers = pair.ask("together")
        queued = max(alone_queued, *(queued for _, _, queued, *_ in answers))
        together = max(seconds for seconds, *_ in answers)
        assert all(entries == expected for *_, entries in answers), "the entries differ"
        ranks = answers[0][3]
        rows.append(
            {
                "alone": alone,
                "together": together,
                "ratio": alone / together,
                "queued": queued,
                "processor_alone": busy,
                "processor_together": [busy for _, busy, *_ in answers],
                "matrices": len(expected),
                "ranks": ranks,
            }
        )
        print(
            f"{number}: alone {alone:.2f} s, together {together:.2f} s, {alone / together:.3f} times as fast, "
            f"{queued:.2f} s in the queue for a processor; {ranks}",
            flush=True,
        )
    rate = pair.ask("move")[0]
    rows.append({"bytes_per_second_of_pieces": rate})
    print(f"pieces of weights: {rate / 1e9:.2f} GB/s over the loopback interface")
    pair.end()
    return rows


def queue() -> float:
    """Seconds that the threads of this process have waited for a processor; 0 where the system does not say."""
    found = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # a thread has ended; none are counted
            found += int(file.read_text().split()[1])
    return found / 1e9


def main() -> None:
    """Print a line for each round, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--matrices", type=int, default=200)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        checkpoint(file, chosen.matrices)
        rows = measure(file, chosen.rounds)
    ratios = [row["ratio"] for row in rows if undisturbed(row)]
    if not ratios:
        sys.exit("other processes have disturbed every round: nothing was measured")
    print(f"two processes are {statistics.median(ratios):.3f} times as fast as one, the median of {len(ratios)}")
    if chosen.output:
        record.write(chosen.output, rows)


if __name__ == "__main__":
    sys.exit(main())
