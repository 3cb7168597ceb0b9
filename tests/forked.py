"""Python code in a process of its own that has imported PyTorch already, which takes most of the time of a new one."""
import multiprocessing
import os
import sys
from pathlib import Path

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['torchvision'])


class Forked:
    """A running process; its methods are those of `subprocess.Popen`.

    Args:
        code: What it runs, as `python -c` does.
        arguments: Its command line.
        environment: Its environment variables, set before it imports anything but PyTorch.
        folder: Gets the files with its output.
    """

    def __init__(self, code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
        self._output, self._errors = folder / 'output', folder / 'errors'
        self._process = _context.Process(
            target=_run, args=(code, arguments, environment, str(self._output), str(self._errors)), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> tuple[str, str]:
        self._process.join()
        return self._output.read_text(), self._errors.read_text()


def _run(code, arguments, environment, output, errors) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    exec(code, {'__name__': '__main__'})
