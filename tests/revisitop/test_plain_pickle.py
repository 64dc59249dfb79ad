"""The reader of plain pickles: equal to the standard one on plain data, and unable to do anything else."""

import pickle
import pickletools
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revisitop.plain_pickle import PlainPickleError, loads

ROOT = Path(__file__).resolve().parents[2]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(st.text(), inner)
        # one object in two places, and more than three in a tuple
        | inner.map(lambda x: [x, x])
        | st.lists(inner).map(tuple)
    ),
    max_leaves=20,
)


class Payload:
    """What a hostile file pickles: loading it with the standard machine creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@settings(deadline=None, max_examples=200)
@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL), st.booleans())
def test_equals_the_standard_machine_on_plain_data(value, protocol, optimised):
    data = pickle.dumps(value, protocol)
    if optimised:
        data = pickletools.optimize(data)
    got = loads(data)
    assert got == value
    assert repr(got) == repr(value)  # tells 1 from True, 1.0 from 1, and a list from a tuple


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\x80\x02U\x03abcq\x01.", "abc"),  # Python 2 str, protocol 2
        (b"S'abc'\np1\n.", "abc"),  # Python 2 str, protocol 0
        (b"T\x02\x00\x00\x00\xc3\xa9.", "é"),  # UTF-8 in a Python 2 str
        (b"\x80\x02U\x01\xe9.", "é"),  # Latin-1 in a Python 2 str
        (b"\x80\x03C\x02\xc3\xa9.", "é"),  # bytes
        (b"(dp0\nS'k'\np1\n(lp2\nI1\naI01\nas.", {"k": [1, True]}),  # protocol 0 dict and list
        (b"(I1\nI2\nl.", [1, 2]),
    ],
)
def test_reads_what_python_2_wrote(data, value):
    assert loads(data) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_payload_is_named_and_not_run(tmp_path, protocol):
    victim = tmp_path / "created"
    data = pickle.dumps({"imlist": [Payload(victim)]}, protocol)
    with pytest.raises(PlainPickleError, match="nothing was executed"):
        loads(data)
    assert not victim.exists()
    pickle.loads(data)["imlist"][0].close()
    assert victim.exists(), "the payload does nothing, so this test proves nothing"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"GLOBAL \(os system\)"),
        (b"(S'true'\nios\nsystem\n.", r"INST \(os system\)"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pid\n.", "PERSID"),
        (b"NQ.", "BINPERSID"),
        (b"}Nb.", "BUILD"),
        (b"]o.", "OBJ"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"]2.", "DUP"),
    ],
)
def test_other_opcodes_are_refused(data, reason):
    with pytest.raises(PlainPickleError, match=reason):
        loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"not a pickle",
        b"]",  # no STOP
        b"]].",  # two values
        b"(].",  # an open mark
        b"a.",  # nothing on the stack
        b"]e.",  # no mark
        b"h\x05.",  # nothing in the memo
        b"}]Ns.",  # a key that is not text
        b"}(Ne.",  # appends to a dict
        b"}(U\x01ku.",  # a key without a value
        b"I12x\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff].\xff"[:6],  # half a FRAME
        b"X\xff\xff\xff\x7fabc.",  # text of 2 GB that is not there
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # bytes of 8 EB
        b"\x80\x63].garbage"[:3],
    ],
)
def test_damage_is_refused(data):
    with pytest.raises(PlainPickleError):
        loads(data)


def test_random_damage_is_refused_or_read():
    data = bytearray(pickle.dumps({"imlist": ["a", "b"], "gnd": [{"easy": [0, 300], "bbx": (1.5, 2, 3, 4)}]}, 2))
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = data.copy()
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        try:
            loads(bytes(damaged))
        except PlainPickleError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
    assert refused > 1000


BOMBS = {
    # Memo slot 2**32 - 1: the standard machine allocates the whole table.
    "memo": b"\x80\x02]r\xff\xff\xff\xff.",
    # Hashing a tuple in a tuple in a tuple ...: the standard machine overflows the C stack.
    "deep key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    # t = (t, t), 60 times, as a key: 2**60 steps to hash.
    "wide key": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "deep list": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "long number": b"L" + b"9" * 2_000_000 + b"L\n.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name, tmp_path):
    """In a process of its own, with memory and time bounded: a crash or a hang must not take the suite along."""
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from revisitop.groundtruth import GroundTruthError, load\n"
        "try: load(sys.argv[2])\n"
        "except GroundTruthError as error: print(error)"
    )
    limit = 2 << 30
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"OPENBLAS_NUM_THREADS": "1"},  # its buffers count as memory
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(path)) and result.stdout.count("\n") == 1
