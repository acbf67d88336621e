"""Files are whole under their names, and what cannot be written is known before."""

import os

import pytest

from fused_rect import files


def wrote(content):
    return lambda file: file.write(content)


def test_a_file_appears_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "new folder" / ("x" * 250)  # a name beside which no longer one fits
    for content in (b"first", b"second"):
        files.replace(path, wrote(content))
        assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]


def test_text_is_utf8_and_what_is_no_text_an_escape(tmp_path):
    files.replace_text(tmp_path / "a", "µ \udcff")
    assert (tmp_path / "a").read_bytes() == "µ ".encode() + b"\\udcff"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)) as raised:
        files.replace(path, write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    assert not isinstance(failure, OSError) or str(path) in str(raised.value)


def test_a_link_is_followed_and_a_pipe_is_no_file_to_replace(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.touch()
    link.symlink_to(target)
    files.replace(link, wrote(b"through"))
    assert link.is_symlink() and target.read_bytes() == b"through"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check(pipe)
    files.replace(pipe, wrote(b"along"))
    assert os.read(reader, 99) == b"along" and pipe.is_fifo()
    os.close(reader)


def test_check_refuses_what_replace_could_not_write_and_touches_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    for name in ("folder", "absent/a", "file/a", "x" * 300):
        with pytest.raises(OSError, match=r"."):
            files.check(tmp_path / name)
    for name in ("file", "new"):
        files.check(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"kept" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_refuses_what_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        files.check(tmp_path / "a")
