"""`make sanitize`, a minute's share of it; and that it notices what it is there for."""

import pytest
import sanitize

from fused_rect.kernels import cpu

pytestmark = [pytest.mark.exhaustive, pytest.mark.skipif(not cpu.available(), reason=cpu.reason())]


@pytest.mark.parametrize("sanitizer, features", sanitize.builds(list(sanitize.SANITIZERS)))
def test_no_fault_under(sanitizer, features):
    passed, said = sanitize.run(sanitizer, features, seed=1, first=0, count=600 if sanitizer == "address" else 120)
    assert passed and " cases, " in said, said


PLACE = "static void run_it(const Call &c) {\n"
MISTAKES = {
    "address": ("  volatile char past = ((const char *)c.out)[c.n * bytes_of[c.type]];\n", "heap-buffer-overflow"),
    "thread": ("  static int n;\n  std::thread t([] { n++; });\n  n++, t.join();\n", "data race"),
}


@pytest.mark.parametrize("sanitizer", MISTAKES)
def test_a_mistake_is_noticed(sanitizer, tmp_path, monkeypatch):
    mistake, report = MISTAKES[sanitizer]
    source = tmp_path / "sanitize.cpp"
    text = sanitize.SOURCE.read_text()
    assert text.count(PLACE) == 1
    source.write_text(text.replace(PLACE, PLACE + mistake))
    monkeypatch.setattr(sanitize, "SOURCE", source)
    monkeypatch.setattr(sanitize, "KEPT", tmp_path)
    passed, said = sanitize.run(sanitizer, "DEFAULT", seed=1, first=0, count=20)
    assert not passed and report in said
