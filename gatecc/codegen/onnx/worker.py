"""Worker: what ONNX's checker and ONNX Runtime do with a file, in this process or in one of its own.

Both load a file as a whole, some of it twice. For a model of many weights that is done apart, so that the process that
holds the model needs no more memory for it. The other process runs this file by itself: it imports neither gatecc nor
torch. A message is a pickled (method, arguments), an answer ("is", value) or ("raised", class, text).
"""

from __future__ import annotations

import os
import pickle
import runpy
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

Arrays = list[Any]
Ends = tuple[list[str], list[str]]  # names of inputs and outputs
_ANY_OPSET = {"ALLOW_RELEASED_ONNX_OPSET_ONLY": "0"}  # ONNX Runtime reads it once: opset 27 is new to some
_ROUNDS = 5  # at least


class RaisedThereError(Exception):
    """An error of the other process. ``kind`` is the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Worker:
    """Does it in this process."""

    def __init__(self) -> None:
        self._session: Any = None

    def check(self, path: str) -> None:
        """ONNX's full check, with shape inference, by path: in memory it ends at 2 GiB."""
        import onnx

        onnx.checker.check_model(path, full_check=True)

    def load(self, path: str, settings: Mapping[str, str], values: Sequence[str] = ()) -> Ends:
        """Load a file into ONNX Runtime with these entries of its configuration, and these values inside it as further
        outputs. Returns the names of its inputs and outputs."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails raises
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        with _with_outputs(path, values) as asked:
            self._session = ort.InferenceSession(asked, options, providers=["CPUExecutionProvider"])
        return [i.name for i in self._session.get_inputs()], [o.name for o in self._session.get_outputs()]

    def evaluate(self, path: str, values: Sequence[str] = ()) -> Ends:
        """As ``load``, into ONNX's reference evaluator."""
        with _with_outputs(path, values) as asked:
            self._session = Reference(asked)
        return self._session.ends

    def run(self, feeds: Mapping[str, Any]) -> Arrays:
        """The outputs of the file that was loaded."""
        return self._session.run(None, dict(feeds))

    def quantize(self, paths: Sequence[str], folder: str, form: str, options: Mapping[str, Any]) -> list[Any]:
        """See ``quantizer.quantize``."""
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "quantizer.py")
        return runpy.run_path(beside)["quantize"](paths, folder, form, options)

    def race(self, paths: Sequence[str], feeds: Mapping[str, Any], seconds: float) -> list[float]:
        """The least CPU time of one run of each file on one thread, in turn for about so many seconds. That of
        this thread alone: others of the process may be busy. Under load its clock stands still now and then, which is
        no time of a run."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        sessions = [ort.InferenceSession(p, options, providers=["CPUExecutionProvider"]) for p in paths]
        best, start, rounds = [float("inf")] * len(paths), time.thread_time(), 0
        while rounds < _ROUNDS or time.thread_time() - start < seconds:
            rounds += 1
            for i, session in enumerate(sessions):
                before = time.thread_time()
                session.run(None, dict(feeds))
                spent = time.thread_time() - before
                best[i] = min(best[i], spent) if spent > 0 else best[i]
        return best

    def close(self) -> None:
        """Let go of the file."""
        self._session = None


class Apart(Worker):
    """Does it in a process of its own, which ends with ``close``."""

    def __init__(self) -> None:
        super().__init__()
        run = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ANY_OPSET, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def check(self, path: str) -> None:
        self._ask("check", path)

    def load(self, path: str, settings: Mapping[str, str], values: Sequence[str] = ()) -> Ends:
        return self._ask("load", path, dict(settings), list(values))

    def evaluate(self, path: str, values: Sequence[str] = ()) -> Ends:
        return self._ask("evaluate", path, list(values))

    def run(self, feeds: Mapping[str, Any]) -> Arrays:
        return self._ask("run", dict(feeds))

    def quantize(self, paths: Sequence[str], folder: str, form: str, options: Mapping[str, Any]) -> list[Any]:
        return self._ask("quantize", list(paths), folder, form, dict(options))

    def race(self, paths: Sequence[str], feeds: Mapping[str, Any], seconds: float) -> list[float]:
        return self._ask("race", list(paths), dict(feeds), seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, *message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, message)
            answer, *told = pickle.load(self._process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as e:  # ValueError: the pipe is closed
            raise RaisedThereError("ended", f"the process ended with code {self._process.wait()}") from e
        if answer == "raised":
            raise RaisedThereError(*told)
        return told[0]


class Reference:
    """ONNX's reference evaluator in the place of ONNX Runtime: slow, and for operators of the standard alone."""

    def __init__(self, path: str) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator: Any = ReferenceEvaluator(path)
        self.ends = list(self._evaluator.input_names), list(self._evaluator.output_names)

    def run(self, names: None, feeds: Mapping[str, Any]) -> Arrays:
        """What a session of ONNX Runtime answers."""
        return self._evaluator.run(names, dict(feeds))


@contextmanager
def _with_outputs(path: str, values: Sequence[str]) -> Generator[str]:
    """The file, or for a while one beside it with these outputs, so that weights in a file of their own are found."""
    if not values:
        yield path
        return
    import onnx

    proto = onnx.load(path, load_external_data=False)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in known)
    written = f"{path}.values"
    try:
        onnx.save(proto, written)
        yield written
    finally:
        os.remove(written)


def _send(file: IO[bytes], message: Any) -> None:
    pickle.dump(message, file, protocol=5)
    file.flush()


def _serve() -> None:
    """Answer until there is nothing more to read. What libraries print goes elsewhere."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker()
    while True:
        try:
            method, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("is", getattr(worker, method)(*arguments))
        except Exception as e:
            answer = ("raised", type(e).__name__, str(e))
        _send(out, answer)


if __name__ == "__main__":
    _serve()
