"""Loading onto and saving from a mesh that spans two processes, as on two hosts."""

import os
import socket
import subprocess
import sys

PROGRAM = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxrlhf.models import load_pretrained, save_pretrained
from jaxrlhf.sharding import make_mesh
model = load_pretrained(sys.argv[3], mesh=make_mesh(data=1, fsdp=4, tensor=2))
table = model.params["embed"]["embedding"]
assert jax.process_count() == 2 and not table.is_fully_addressable
assert sum(s.data.size for s in table.addressable_shards) == table.size // 2
save_pretrained(model, sys.argv[4], max_shard_bytes=20_000)
"""


def test_an_export_from_two_processes_holds_the_same_bytes(make_model, tmp_path):
    from jaxrlhf.models import save_pretrained

    sizes = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 8, "head_dim": 4, "intermediate_size": 48}
    save_pretrained(make_model("gpt2", **sizes), tmp_path / "one", max_shard_bytes=20_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=4")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    arguments = [str(tmp_path / "one"), str(tmp_path / "two")]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
