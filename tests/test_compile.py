"""A C++ source is compiled once for a user, and whatever is wrong with cache folder or compiler, the models run."""
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from timm_deluge import ops
from timm_deluge.ops import aten, compile, implementation

needs_compiler = pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
OPTIONS = ['-fPIC']
# compile.py alone, without PyTorch: a process takes a tenth of a second
PROCESS = f"""if True:
    import importlib.util, os, pathlib, signal, sys
    spec = importlib.util.spec_from_file_location('compile_alone', {compile.__file__!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PATIENCE = 600
    if 'killed before the file has its name' in sys.argv:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    print(module.compile_library(pathlib.Path(sys.argv[1]), {OPTIONS}).answer())
"""


class Place(SimpleNamespace):
    """A home with a cache folder, a source, and a compiler that keeps a list of what it compiled."""

    def run(self, *arguments) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, '-c', PROCESS, self.source, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True)

    def answer(self, options=()) -> int:
        return compile.compile_library(self.source, [*OPTIONS, *options]).answer()

    def libraries(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def compilations(self) -> int:
        return self.log.read_text().count('compiled') if self.log.exists() else 0


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    source, compiler, log = (tmp_path / name for name in ('source.cpp', 'compiler', 'log'))
    source.write_text('extern "C" int answer() { return 42; }')
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*)\necho compiled >> {log}\n'
        f'if [ -e {tmp_path}/kill ]; then rm {tmp_path}/kill; kill -9 $PPID; fi;;\nesac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr(compile, '_said', set())
    monkeypatch.setattr(compile, 'PATIENCE', 600.)
    return Place(source=source, compiler=compiler, log=log, folder=tmp_path / 'cache' / 'timm_deluge')


def assert_compiles_for_itself(place, caplog, reason):
    """Expect two libraries, the cache folder as it was, and one warning that names it and the reason."""
    before = place.libraries() if place.folder.is_dir() else None
    assert place.answer() == place.answer(['-DSECOND']) == 42
    assert place.compilations() == 2
    assert before is None or before == place.libraries()
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert str(place.folder) in record.message and reason in record.message


@needs_compiler
def test_a_second_process_does_not_compile(place):
    for _ in range(2):
        process = place.run()
        assert process.communicate() == ('42\n', '')
        assert place.compilations() == 1
    (library,) = place.libraries()
    assert stat.S_IMODE(library.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700


@needs_compiler
def test_eight_processes_at_once(place):
    processes = [place.run() for _ in range(8)]
    assert [process.communicate() for process in processes] == [('42\n', '')] * 8
    assert len(place.libraries()) == 1


@needs_compiler
@pytest.mark.parametrize('when', ['while it compiles', 'before the file has its name'])
def test_a_killed_process_leaves_nothing_that_is_used(place, when):
    if when == 'while it compiles':
        (place.compiler.parent / 'kill').touch()
    process = place.run(f'killed {when}')
    process.communicate()
    assert process.returncode == -9
    assert not list(place.folder.glob('source-*'))
    assert place.compilations() == 1
    assert place.run().communicate() == ('42\n', '')
    assert len(list(place.folder.glob('source-*'))) == 1


@needs_compiler
@pytest.mark.parametrize('size', [0, 1000, -1])
def test_a_truncated_library_is_compiled_again(place, caplog, size):
    assert place.run().communicate() == ('42\n', '')
    (library,) = place.libraries()
    content = library.read_bytes()
    library.write_bytes(content[:size])
    assert place.answer() == 42
    assert place.compilations() == 2 and not caplog.records
    assert place.libraries() == [library] and library.read_bytes() == content


@needs_compiler
def test_source_options_compiler_and_processor_make_another_library(place, monkeypatch):
    def libraries_more() -> int:
        before = len(place.libraries())
        assert place.answer() == place.answer() == 42
        return len(place.libraries()) - before

    assert place.answer() == 42
    assert libraries_more() == 0
    place.source.write_text(place.source.read_text() + '\n')
    assert libraries_more() == 1
    monkeypatch.setattr(sys.modules[__name__], 'OPTIONS', [*OPTIONS, '-O2'])
    assert libraries_more() == 1
    monkeypatch.setenv('CXX', f'{place.compiler} -DWHATEVER')
    assert libraries_more() == 1
    text = place.compiler.read_text()
    place.compiler.write_text(text.replace('exec', '[ "$2" != --version ] || echo 13.1\nexec'))
    assert libraries_more() == 1
    (other := place.compiler.with_name('other')).mkdir()
    monkeypatch.setenv('PATH', f'{other}{os.pathsep}{os.environ["PATH"]}')
    (other / 'c++').symlink_to(shutil.which('c++'))
    monkeypatch.delenv('CXX')
    assert libraries_more() == 1
    (other / 'c++').unlink()
    assert libraries_more() == 1
    monkeypatch.setattr(compile, '_processor', lambda: ['flags : avx1024'])
    assert libraries_more() == 1


def test_the_processor_is_described_the_same_at_every_time():
    assert compile._processor() == compile._processor()
    if Path('/proc/cpuinfo').exists():
        assert len(compile._processor()) > 1


@pytest.mark.parametrize('field', ['model name', 'flags', 'Features', 'isa'])
def test_each_of_a_processors_features_is_described(field, monkeypatch):
    def described(features, mhz='2445.404') -> list[str]:
        text = f'processor\t: 0\n{field}\t: {features}\ncpu MHz\t: {mhz}\n'
        monkeypatch.setattr(Path, 'read_text', lambda self, **options: text)
        return compile._processor()

    assert described('avx2') != described('avx2 avx512f')
    assert described('avx2') == described('avx2', '1500.000')


@needs_compiler
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk(place, caplog, monkeypatch):
    class FullDisk:
        @staticmethod
        def mkstemp(dir):
            descriptor, path = tempfile.mkstemp(dir=dir)
            if dir.parts[:2] == ('/', 'proc') or dir == place.folder:
                os.close(descriptor)
                descriptor = os.open('/dev/full', os.O_WRONLY)
            return descriptor, path

        TemporaryDirectory = tempfile.TemporaryDirectory

    monkeypatch.setattr(compile, 'tempfile', FullDisk)
    assert_compiles_for_itself(place, caplog, 'No space left on device')
    assert place.libraries() == []


@needs_compiler
def test_nowhere_to_write(place, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(place.source))
    with pytest.raises(ImportError, match=r'source.cpp cannot be compiled with .*Not a directory'):
        place.answer()


@needs_compiler
def test_a_cache_folder_that_cannot_be_made(place, caplog, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(place.source))
    place.folder = place.source / 'timm_deluge'
    assert_compiles_for_itself(place, caplog, 'Not a directory')


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_cache_folder(place, caplog):
    place.folder.mkdir(parents=True, mode=0o500)
    assert_compiles_for_itself(place, caplog, 'Permission denied')


@needs_compiler
@pytest.mark.parametrize('mode', [0o770, 0o707])
def test_a_folder_that_others_may_write_is_not_used(place, caplog, mode):
    assert place.run().communicate() == ('42\n', '')
    place.log.unlink()
    place.folder.chmod(mode)
    assert_compiles_for_itself(place, caplog, 'others may write it (remove it, or chmod go-w it)')


@needs_compiler
@pytest.mark.parametrize('mode', [0o660, 0o606])
def test_a_file_that_others_may_write_is_not_used(place, caplog, mode):
    assert place.answer() == place.answer(['-DSECOND']) == 42
    place.log.unlink()
    for library in place.libraries():
        library.chmod(mode)
    assert_compiles_for_itself(place, caplog, '.so belongs to another user or others may write it (remove it')


@needs_compiler
def test_a_folder_of_another_user_is_not_used(place, caplog, monkeypatch):
    place.folder.mkdir(parents=True, mode=0o700)
    user = os.geteuid()
    monkeypatch.setattr(os, 'geteuid', lambda: user + 1)
    assert_compiles_for_itself(place, caplog, 'the folder belongs to another user')


@needs_compiler
@pytest.mark.parametrize('base', ['', 'relative/folder'])
def test_the_folder_without_xdg_is_in_the_home(place, monkeypatch, base):
    monkeypatch.setenv('XDG_CACHE_HOME', base)
    monkeypatch.setenv('HOME', str(place.folder.parent))
    assert place.answer() == 42
    assert [path.parent.name for path in place.folder.parent.glob('.cache/*/*')] == ['timm_deluge']


@needs_compiler
def test_slow_compiling_is_said_once(place, caplog, monkeypatch):
    assert place.answer() == 42
    assert not caplog.records
    monkeypatch.setattr(compile, 'PATIENCE', 0.)
    assert place.answer(['-DFIRST']) == place.answer(['-DSECOND']) == 42
    (record,) = caplog.records
    assert record.levelname == 'WARNING' and 'Compiling source.cpp' in record.message


@needs_compiler
def test_errors_of_the_compiler_are_shown(place):
    place.source.write_text('no C++')
    with pytest.raises(ImportError, match=r'source.cpp cannot be compiled with .*compiler.*error'):
        place.answer()
    assert place.libraries() == []


@needs_compiler
def test_a_killed_compiler(place):
    place.compiler.write_text('#!/bin/sh\nkill -9 $$\n')
    with pytest.raises(ImportError, match='source.cpp cannot be compiled with .*SIGKILL'):
        place.answer()
    assert place.libraries() == []


def test_a_compiler_that_cannot_be_parsed_is_named(monkeypatch):
    monkeypatch.setenv('CXX', "g++ '")
    with pytest.raises(ImportError, match='CXX=.*No closing quotation'):
        compile.compile_library(Path('kernels.cpp'), [])


@needs_compiler
def test_without_a_compiler_aten_takes_over_with_one_warning(place, caplog, monkeypatch, cache_home):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/nowhere')
    monkeypatch.delitem(sys.modules, 'timm_deluge.ops.cpp', raising=False)
    monkeypatch.delattr(ops, 'cpp', raising=False)
    assert kernels_of_both_types(monkeypatch) == [aten, aten]
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert "'no-such-compiler'" in record.message and 'apt install g++' in record.message
    with pytest.raises(ImportError, match="kernels.cpp cannot be compiled with 'no-such-compiler'"):
        implementation.set_implementation('cpp')
    assert len(caplog.records) == 1
    monkeypatch.delenv('CXX')
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache_home))
    for name, expected in ('reference', aten), ('auto', aten), ('cpp', None), ('auto', None):
        implementation.set_implementation(name)  # 'cpp' looks anew: one may have been installed
        assert ops.choose_backend(torch.empty(0)) is (expected or sys.modules['timm_deluge.ops.cpp'])
    assert len(caplog.records) == 1


def test_where_only_bfloat16_does_not_compile_aten_takes_it_with_one_warning(caplog, monkeypatch):
    def library(element):
        if element == 'bfloat16':
            raise ImportError('kernels.cpp cannot be compiled: no space')

    cpp = SimpleNamespace(_library=library, _ELEMENTS={torch.float32: 'float', torch.bfloat16: 'bfloat16'})
    monkeypatch.setattr(ops, 'cpp', cpp, raising=False)
    assert kernels_of_both_types(monkeypatch) == [aten, cpp]
    (record,) = caplog.records
    assert 'no space' in record.message


def kernels_of_both_types(monkeypatch) -> list:
    """The modules that serve bfloat16 and float32 tensors, each asked for twice."""
    monkeypatch.setattr(implementation, '_cpp', implementation.cache(implementation._cpp.__wrapped__))
    tensors = [torch.empty(0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    found = [[ops.choose_backend(x) for x in tensors] for _ in range(2)]
    assert found[0] == found[1]
    return found[0]
