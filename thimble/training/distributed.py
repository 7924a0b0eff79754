"""One process or several (torchrun): how they find each other, agree, and learn that one is gone.

A process that fails leaves its reason in the store that torchrun keeps for all of them. One that is
killed leaves none, but its connections break and its number is no longer among the living. So
nobody waits for the dead: whoever is still there stops, and names the process and the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thimble.errors import ConfigError, EnvironmentProblem, GuardStop, Interrupted, ThimbleError
from thimble.training.signals import handling, ignore_sigterm, leave_at_once
from thimble.training.sparse_sign import sparse_weights

# How long the address of the rendezvous may stay without an answer.
RENDEZVOUS = timedelta(seconds=60)
# How long the slowest may be behind the fastest: within the step, and while the first writes files.
COLLECTIVE, MEETING = timedelta(minutes=10), timedelta(hours=1)
# A process that computes, or is stuck in a call of its device, has so long to notice by itself that
# another one is gone. torchrun kills what is left after 30 seconds.
GRACE = 10.0
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # names the file from which torchrun takes a reason

_store: Any = None  # one for the life of the process; every training in it has its own prefix
_trainings = 0


class ProcessFailed(EnvironmentProblem):
    """Another process of this training failed or was killed; the exit status is that one's."""

    def __init__(self, message: str, rank: int, status: int) -> None:
        super().__init__(message)
        self.rank, self.status = rank, status


class Processes:
    """This process's rank among ``count``; all methods are no-ops when it is alone."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.main = self.rank == 0
        self.lost: Callable[[ProcessFailed], None] = lambda error: None
        self.peers: dict[int, psutil.Process] = {}
        self.ended = threading.Event()
        self.store: Any = None
        self.connections: dict[int, int] = {}
        self.gave_up = False

    # --- working together

    def rows(self, batch: int) -> slice:
        """The rows of a global batch that belong to this process."""
        if batch % self.count:
            raise ConfigError(
                f"A step of {batch} sequences cannot be split over {self.count} processes. Choose "
                "training.micro_batch_size x training.gradient_accumulation_steps as a multiple."
            )
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def by_rows(
        self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor
    ) -> torch.Tensor:
        """``function`` of tensors [B, ...], row by row: each process computes its rows, all get
        all of the result [B, ...]."""
        if self.count == 1:
            return function(*tensors)
        rows = len(tensors[0])
        first, end = (n * rows // self.count for n in (self.rank, self.rank + 1))
        # With fewer rows than processes some compute one for nothing, as none may stay away.
        mine = function(*(tensor[first : max(end, first + 1)] for tensor in tensors))
        result = mine.new_zeros(rows, *mine.shape[1:])
        result[first:end] = mine[: end - first]
        return self.add(result)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any process has it set. Waits for the host, not for the device."""
        if self.count == 1:
            return flags
        box = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(flag) for flag in box.tolist())

    def add_on_host(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes of a tensor in main memory. Waits for the host, not for the device."""
        if self.count > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.count > 1:
            box = torch.tensor([value])
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
            return int(box)
        return value

    def everywhere(self, flags: torch.Tensor) -> np.ndarray:
        """Flags in main memory, of all processes one after the other: bool [count x flags]."""
        if self.count == 1:
            return flags.numpy().copy()
        return self.joined(flags.to(torch.uint8), group=self.control).numpy().astype(bool)

    def joined(self, tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
        """The tensors of all processes, of one shape, one after the other along the first axis."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    def share(self, text: str) -> str:
        """The main process's text, on every process."""
        if self.count == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    # --- finding each other

    @contextlib.contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """The body runs with all processes connected.

        Raises EnvironmentProblem when they do not find each other, and ProcessFailed instead of
        whatever the loss of another process made the body raise.
        """
        global _trainings
        if self.count == 1:
            yield
            return
        _trainings += 1
        try:
            store = rendezvous(self.rank, self.count)
        except EnvironmentProblem as error:
            error.spoken_for = os.environ.get("LOCAL_RANK", "0") != "0"  # type: ignore[attr-defined]
            raise
        with contextlib.suppress(OSError):
            os.unlink(os.environ.get(ERROR_FILE, ""))  # of a training before this one
        self.store = dist.PrefixStore(f"thimble/{_trainings}", store)
        with handling(leave_at_once, signal.SIGTERM):
            try:
                self.connect(device)
                threading.Thread(target=self.watch, args=(self.store.clone(),), daemon=True).start()
                yield
            except BaseException as error:
                explained = self.explain(error)
                if explained is error:
                    raise
                raise explained from error
            finally:
                self.ended.set()
                with contextlib.suppress(RuntimeError):  # the store may be gone with its process
                    self.store.set(f"left/{self.rank}", "1")
                if self.gave_up:
                    hang_up(self.connections)
                if dist.is_initialized():
                    disconnect(device)

    def connect(self, device: torch.device) -> None:
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        before = open_sockets()
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.count, timeout=COLLECTIVE
        )
        self.control: Any = dist.new_group(backend="gloo", timeout=MEETING)
        facts: list[Any] = [None] * self.count
        mine = (socket.gethostname(), os.getpid())
        dist.all_gather_object(facts, mine, group=self.control)
        # Pairs, as a number may have been freed since and given again.
        self.connections = dict(open_sockets().items() - before.items())
        for rank, (host, number) in enumerate(facts):
            # In containers a number may mean another process, or none, from the start.
            if rank != self.rank and host == mine[0] and psutil.pid_exists(number):
                self.peers[rank] = psutil.Process(number)

    # --- losing one

    def tell(self, **note: Any) -> None:
        """Leave a note for the others, who will find their connections broken. The first counts."""
        if self.count > 1:
            self.gave_up = True
            text = json.dumps({"rank": self.rank, **note})
            with contextlib.suppress(RuntimeError):
                self.store.compare_set("note", "", text)

    def note(self, store: Any = None) -> dict[str, Any] | None:
        """The note another process left, if one did."""
        store = store or self.store
        with contextlib.suppress(RuntimeError):
            if store.check(["note"]):
                note: dict[str, Any] = json.loads(store.get("note"))
                return note if note["rank"] != self.rank else None
        return None

    def failure(self, store: Any = None) -> ProcessFailed | None:
        """What happened to another process, as far as this one can know by now."""
        note = self.note(store)
        if note:
            message = f"Process {note['rank']} of {self.count} failed: {note['reason']}"
            return ProcessFailed(message, note["rank"], note["status"])
        for rank, process in self.peers.items():
            if alive(process):
                continue
            with contextlib.suppress(RuntimeError):
                if (store or self.store).check([f"left/{rank}"]):
                    continue
            return ProcessFailed(
                f"Process {rank} of {self.count} (pid {process.pid}) was killed or crashed: it "
                "left no reason. By which signal, torchrun reports (SIGKILL: often for want of "
                "memory). Go on with --resume.",
                rank,
                EnvironmentProblem.status,
            )
        return None

    def told(self, error: BaseException) -> dict[str, Any] | None:
        """The note behind a broken connection, waited for a moment; None for any other error."""
        if self.count == 1 or not is_connection(error):
            return None
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            note = self.note()
            if note or self.failure():
                return note
            time.sleep(0.1)
        return None

    def speaks(self, error: BaseException) -> bool:
        """Whether this process shows and records what ended all of them."""
        first_is_gone = isinstance(error, ProcessFailed) and error.rank == 0
        return self.rank == (1 if first_is_gone else 0)

    def explain(self, error: BaseException) -> BaseException:
        """The error to end with: this process's own, which the others are told, or another's.

        ``spoken_for`` on it says that another process shows it.
        """
        if self.count == 1 or self.ended.is_set():
            return error
        self.ended.set()
        ignore_sigterm()  # torchrun ends whoever is left; last words take a moment
        agreed = isinstance(error, GuardStop) or (
            isinstance(error, Interrupted) and not self.failure()
        )
        if agreed:
            error.spoken_for = not self.speaks(error)  # type: ignore[attr-defined]
            tell_torchrun(str(error), first=self.speaks(error))
            return error
        if is_connection(error) or isinstance(error, Interrupted):
            self.told(error)
            found = self.failure()
            if found is None and is_connection(error):
                reason = (str(error).splitlines() or [""])[0][:200]
                found = ProcessFailed(
                    f"The connection to another process broke ({reason}) and none says why: look "
                    "at the other machines. Go on with --resume.",
                    -1,
                    EnvironmentProblem.status,
                )
            if found is not None:
                found.spoken_for = not self.speaks(found)  # type: ignore[attr-defined]
                tell_torchrun(str(found), first=False)
                return found
        reason = (
            str(error) if isinstance(error, ThimbleError) else f"{type(error).__name__}: {error}"
        )
        earlier = self.note()
        status = getattr(error, "status", 1)
        self.tell(reason=reason, status=status)
        error.spoken_for = bool(earlier and earlier["reason"] == reason)  # type: ignore[attr-defined]
        tell_torchrun(reason, first=True)
        return error

    def watch(self, store: Any) -> None:
        """Ends this process when another one is gone and this one does not come to notice it.

        That happens in a call that never returns: a device that waits for the other's gradients.
        """
        while not self.ended.wait(1.0):
            found = self.failure(store)
            if found and not self.ended.wait(GRACE):
                self.lost(found)
                tell_torchrun(str(found), first=False)
                if self.speaks(found):
                    print(f"error: {found}", file=sys.stderr, flush=True)
                os._exit(found.status)


def data_parallel(objective: nn.Module) -> nn.Module:
    """The objective with its gradients averaged over processes; sparse ones, which NCCL cannot add
    up, are left to ``SparseSignSGD``."""
    sparse = sparse_weights(objective)
    trained = (p for name, p in objective.named_parameters() if name not in sparse)
    if not any(parameter.requires_grad for parameter in trained):
        return objective
    # Buffers are the same everywhere from the start, and nothing changes them.
    left_out = [*sparse, *(name for name, _ in objective.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, left_out)
    return DistributedDataParallel(objective)


def rendezvous(rank: int, count: int) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, through which the processes find each other.

    Raises EnvironmentProblem when it does not answer, or the others do not come, in ``RENDEZVOUS``.
    """
    global _store
    if _store is not None:
        return _store
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    where, seconds = f"{host}:{port}", RENDEZVOUS.total_seconds()
    if not host or not port.isdigit():
        raise EnvironmentProblem(
            f"WORLD_SIZE is {count}, but MASTER_ADDR:MASTER_PORT is {where!r}. Start several "
            "processes with torchrun, which sets them:\n"
            f"  torchrun --nproc-per-node {count} -m thimble train RECIPE"
        )
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        wait_for_answer(host, int(port), seconds)
    try:
        _store, _, _ = next(iter(dist.rendezvous("env://", rank, count, timeout=RENDEZVOUS)))
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EnvironmentProblem(
            f"The {count} processes did not find each other at {where} within {seconds:.0f} s "
            f"({reason.rstrip('.')}). Check that all of them are started, with the same "
            "WORLD_SIZE, and that nothing else uses the port."
        ) from error
    _store.set_timeout(COLLECTIVE)
    return _store


def wait_for_answer(host: str, port: int, seconds: float) -> None:
    """Return once something listens there; torch itself prints a stack trace for every attempt."""
    deadline = time.monotonic() + seconds
    while True:
        patience = max(deadline - time.monotonic(), 1.0)
        try:
            socket.create_connection((host, port), timeout=patience).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise EnvironmentProblem(
                    f"The rendezvous at {host}:{port} has not answered for {seconds:.0f} s "
                    f"({error.strerror or error}). Check that the process of rank 0 is started, "
                    "that MASTER_ADDR and MASTER_PORT (torchrun: --master-addr, --master-port) "
                    "name its machine, and that no firewall is between."
                ) from None
        time.sleep(min(0.5, seconds / 4))


def disconnect(device: torch.device) -> None:
    if device.type == "cuda" and sys.exc_info()[0] is not None:
        # Destroying would wait for collectives that the others will never join.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)
        with contextlib.suppress(RuntimeError):
            abort()
    else:
        dist.destroy_process_group()


def open_sockets() -> dict[int, int]:
    """The numbers of this process's sockets, each with its inode, which no other one shares."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            facts = os.fstat(int(name))
            if stat.S_ISSOCK(facts.st_mode):
                found[int(name)] = facts.st_ino
    return found


def hang_up(connections: dict[int, int]) -> None:
    """End connections, for the others to notice at once.

    gloo ends them only when nothing refers to it any more, and a traceback may for long.
    """
    still_open = open_sockets()
    for number, node in connections.items():
        if still_open.get(number) == node:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.getpeername()  # gloo does not survive the end of one that listens
                connection.shutdown(socket.SHUT_RDWR)


def is_connection(error: BaseException) -> bool:
    """Whether this is what torch raises in one process when another one is gone."""
    words = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tell_torchrun(reason: str, *, first: bool) -> None:
    """Write the file from which torchrun takes the reason for its report.

    The keys are those of torch.distributed.elastic.multiprocessing.errors, whose own writer gives
    the whole traceback; ours is in the run's error.txt. torchrun takes the earliest failure for the
    cause, in whole seconds, so who only followed comes a second later.
    """
    path = os.environ.get(ERROR_FILE)
    if path:
        when = int(time.time()) + (0 if first else 2)
        extra = {"py_callstack": reason, "timestamp": str(when)}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": reason, "extraInfo": extra}}, file)
