"""The names that users import, and what importing them costs."""

import subprocess
import sys

import pytest

import kvmesh


def test_the_public_names() -> None:
    assert sorted(kvmesh.__all__) == [
        "AgentUnavailableError",
        "CallerError",
        "ChunkTooLargeError",
        "CorruptChunkError",
        "Hit",
        "KVMeshError",
        "LeaseError",
        "Mesh",
        "Namespace",
        "NamespaceError",
        "Part",
        "PeerError",
        "ProtocolError",
        "PutResult",
        "SettingsError",
        "TensorError",
        "TensorSpec",
        "UnreachableError",
        "UnsupportedModelError",
        "VersionMismatchError",
        "connect",
    ]
    assert all(getattr(kvmesh, name).__doc__ for name in kvmesh.__all__)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        kvmesh.conect  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvmesh", ["numpy", "zmq", "torch", "msgspec"]),
        ("kvmesh.cli", ["numpy", "zmq", "torch", "transformers", "asyncio"]),
        ("kvmesh.agent", ["torch", "transformers", "rich"]),
        ("kvmesh.controller", ["torch", "transformers", "rich"]),
    ],
)
def test_what_an_import_does_not_bring(module: str, absent: list[str]) -> None:
    check = f"import sys, {module}; sys.exit(' '.join(n for n in {absent!r} if n in sys.modules) or None)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"import {module} brought {result.stderr}"
