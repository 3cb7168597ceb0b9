"""Compile C++ for the processor at hand, once for all processes of a user.

Libraries are kept in the user's cache folder, `$XDG_CACHE_HOME/timm_deluge` or `~/.cache/timm_deluge`. A file's name
tells what it was made from and holds half of the SHA-256 of its content, so that a damaged file is not loaded. Folder
and file must belong to the user, and no one else may be able to write them; otherwise each process compiles for itself.
"""
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer

__all__ = ['compile_library']

PATIENCE = 1.  # seconds of compiling before it is logged
PROCESSOR_FIELDS = {
    'vendor_id', 'cpu family', 'model', 'model name', 'stepping', 'flags',  # x86
    'CPU implementer', 'CPU architecture', 'CPU variant', 'CPU part', 'Features',  # ARM
    'cpu', 'isa', 'uarch',  # POWER, RISC-V
}

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def compile_library(source: Path, options: Sequence[str]) -> ctypes.CDLL:
    """Load the library that a C++ source makes, from the user's cache folder if it was made before.

    The compiler is `$CXX`, or else `c++`.

    Args:
        source: A file that includes only the compiler's own headers.
        options: For the compiler. The linker gets none of them: with -fopenmp it would bring a second OpenMP, which
            would fight PyTorch's for the cores.

    Raises:
        ImportError: If there is no compiler, it fails, or the library cannot be written or loaded.
    """
    try:
        compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
    except ValueError as error:
        raise ImportError(f"the environment variable CXX={os.environ['CXX']!r}: {error}") from error
    folder = _cache_folder()
    try:
        name = f'{source.stem}-{_key(source, compiler, options)}'
        with suppress(OSError), _checked(folder) as checked:
            if library := _load(checked, name):
                return library
        compiled = _compile(source, compiler, options)
        try:
            with _checked(folder) as checked:
                return _load(checked, name) or _write_and_load(checked, name, compiled)
        except OSError as error:
            with tempfile.TemporaryDirectory() as private:
                library = _write_and_load(Path(private), name, compiled)
            _warn_once(
                '%s is not used as a cache, so every process compiles %s for itself: %s. '
                'XDG_CACHE_HOME can name another place.', folder, source.name, error.strerror or error)
            return library
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, 'stderr', '') or error
        raise ImportError(f'{source.name} cannot be compiled with {compiler[0]!r} and loaded: {reason}') from error


def _cache_folder() -> Path:
    base = os.environ.get('XDG_CACHE_HOME', '')
    return Path(base if os.path.isabs(base) else os.path.expanduser('~/.cache'), 'timm_deluge')


@contextmanager
def _checked(folder: Path) -> Iterator[Path]:
    """Make the cache folder if it is missing, and hold it open.

    Yields:
        A path that leads to the folder that was checked, even if another one takes its place.

    Raises:
        OSError: If it cannot be made or opened, or is not the user's alone.
    """
    if os.name != 'posix' or not folder.is_absolute():
        raise OSError('there is no home folder whose owner is known')
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check_owner(descriptor, 'the folder')
        opened = Path(f'/proc/self/fd/{descriptor}')
        yield opened if opened.exists() else folder
    finally:
        os.close(descriptor)


def _check_owner(descriptor: int, what: str) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f'{what} belongs to another user or others may write it (remove it, or chmod go-w it)')


def _load(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load a library from the cache folder; None if it is missing or damaged."""
    for path in folder.glob(f'{name}-*.so'):
        with open(path, 'rb') as file:
            _check_owner(file.fileno(), path.name)
            content = file.read()
        if path.name == _file_name(name, content):
            return ctypes.CDLL(str(path))
    return None


def _write_and_load(folder: Path, name: str, content: bytes) -> ctypes.CDLL:
    """Write a library and load it. The file gets its name last, so that no other process sees an incomplete one."""
    descriptor, temporary = tempfile.mkstemp(dir=folder)
    try:
        with open(descriptor, 'wb') as file:
            file.write(content)
        library = ctypes.CDLL(temporary)
        os.replace(temporary, folder / _file_name(name, content))
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _file_name(name: str, content: bytes) -> str:
    return f'{name}-{_digest(content)}.so'


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _key(source: Path, compiler: Sequence[str], options: Sequence[str]) -> str:
    """Digest all that the compiled library depends on, including the processor, for which -march=native compiles."""
    version = subprocess.run([*compiler, '--version'], capture_output=True)
    parts = source.read_bytes(), shutil.which(compiler[0]), compiler, version.stdout, options, _processor()
    return _digest(repr(parts).encode())


def _processor() -> list[str]:
    try:
        lines = Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
    except OSError:
        lines = []
    return [platform.machine(), *sorted({line for line in lines if line.split(':')[0].strip() in PROCESSOR_FIELDS})]


def _compile(source: Path, compiler: Sequence[str], options: Sequence[str]) -> bytes:
    """Make a library, and say so if that takes a while."""
    timer = Timer(PATIENCE, _warn_once, ('Compiling %s for this processor: some seconds.', source.name))
    timer.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled, library = f'{folder}/compiled.o', f'{folder}/library.so'
            for arguments in ([*options, '-c', str(source), '-o', compiled], ['-shared', compiled, '-o', library]):
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, errors='replace')
            return Path(library).read_bytes()
    finally:
        timer.cancel()


def _warn_once(message: str, *values: object) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message, *values)
