"""Program of the processes that tests/distributed/test_processes.py starts, and the settings that both share."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

SMALL = {"max_length": 64, "max_prompt_seq_len": 32, "seed": 3, "max_eval_samples": 11, "mesh_fsdp": 4}
SMALL |= {"per_device_eval_batch_size": 2, "lr_scheduler_type": "constant"}
# A large epsilon: the update is then nearly linear in the gradient, and rounding does not decide its sign.
SMALL |= {"learning_rate": 1e-2, "adam_epsilon": 1e-2}


def data_of(demo):
    return {"data_path": (demo["train"],), "eval_data_path": (demo["eval"],), "data_cache_dir": demo["cache"]}


def sft_config(demo, output, **changes):
    from jaxrlhf.trainers.sft import SFTConfig

    options = {"max_steps": 2, "save_steps": 1, "save_total_limit": 0, "mesh_tensor": 2}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    options |= {"model_name_or_path": demo["lm"], "disable_dropout": True, "output_dir": str(output)}
    return SFTConfig.create(**(SMALL | data_of(demo) | options | changes))


def ppo_config(demo, output, **changes):
    from jaxrlhf.rl.config import PPOConfig

    options = {"max_steps": 1, "mesh_data": 2, "max_answer_seq_len": 8, "sample_steps": 1, "num_sample_rows": 16}
    options |= {
        "per_device_train_batch_size": 2,
        "critic_learning_rate": 1e-2,
        "lora_r": 2,
        "lora_export": "both",
        "output_dir": str(output),
    }
    models = {"actor_model_name_or_path": demo["lm"], "critic_model_name_or_path": demo["reward"]}
    return PPOConfig.create(**(SMALL | data_of(demo) | options | models | changes))


def rlhf_config(demo, output, **changes):
    from jaxrlhf.commands.rlhf import RLHFConfig

    step = {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    step |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    shared = {name: SMALL[name] for name in ("max_length", "max_prompt_seq_len", "seed", "max_eval_samples")}
    steps = {"sft": step, "reward": step, "ppo": step | {"max_answer_seq_len": 8}}
    options = {"actor_model_name_or_path": demo["lm"], "output_dir": str(output)}
    return RLHFConfig.create(**(shared | data_of(demo) | options | steps | changes))


def in_step(number, action, of=""):
    """Call `action()` in this process within step `number` of the next run, or of the run in a folder named `of`."""
    from jaxrlhf.trainers.guards import Guard

    before = Guard.check

    def check(guard, metrics, step):
        before(guard, metrics, step)
        if step == number and of in ("", guard.run.output_dir.name):
            Guard.check = before
            action()

    Guard.check = check


def refusal(function):
    """Return the text of the InputError that `function()` must raise."""
    from jaxrlhf import InputError

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            function()
        except InputError as error:
            return str(error)
    raise AssertionError("nothing was refused")


def rewarded(note):
    """Return scores, failures and an error of reward functions; `note` gets the calls, which only process 0 makes."""
    from jaxrlhf.rewards import Rewards

    done = []

    def size(prompts, responses, answer):
        done.append(f"called with {len(prompts)}")
        pairs = zip(responses, answer, strict=True)
        return [math.nan if response == "bad" else len(response) + float(a) for response, a in pairs]

    rewards = Rewards([size, "regex:pattern=b"], (2.0, 0.5), say=lambda text: done.append(text.splitlines()[0]))
    result = rewards.submit(["p", "q", "r"], ["bad", "cccc", "b"], {"answer": ["1", "0.1", "7"]}).result()
    wrong = refusal(Rewards([lambda prompts, responses: "text"]).submit(["p"], ["b"]).result)
    note.write_text(json.dumps(done))
    scores = [None if score != score else float(score) for score in result.scores]
    return {"scores": scores, "failures": result.failures, "refused": wrong}


def saves(folder, process):
    """Save in the background with a disk that is full for process 1 at first; return what is printed and restored."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxrlhf.distributed import barrier, gather, to_host
    from jaxrlhf.errors import StorageError
    from jaxrlhf.runs import pending_save, saving
    from jaxrlhf.runs.checkpoints import restore_checkpoint
    from jaxrlhf.sharding import make_mesh

    saving.RETRY = 0.0
    said, facts_of = [], pending_save.file_facts

    def full(*args):
        raise OSError(28, "No space left on device")

    placed = NamedSharding(make_mesh(1, -1), PartitionSpec("fsdp"))
    state = {"w": jax.device_put(jnp.arange(64.0), placed), "n": 1}
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    saver = saving.Saver(folder, saving.Retention(1), max_failures=2, say=said.append)
    pending_save.file_facts = full if process == 1 else facts_of
    saver.start(1, state, {})
    state["w"] = step(state["w"])
    saver.wait()
    pending_save.file_facts = facts_of
    saver.start(2, state, {})
    expected, looks = to_host(state["w"]), 0
    while saver._pending:
        state["w"] = step(state["w"])
        saver.advance(gather("a boundary", saver.report()))
        looks += 1
    restored, _ = restore_checkpoint(folder / "checkpoint-2", state)
    same = bool((to_host(restored["w"]) == expected).all())
    files = json.loads((folder / "checkpoint-2" / "index.json").read_text())["files"]
    own = [name for name in files if name.startswith("ocdbt.process_1/d/")]
    barrier("restored")
    if process == 0:
        path = folder / "checkpoint-2" / "state" / own[0]
        path.write_bytes(bytes(path.stat().st_size))
    barrier("damaged")
    try:
        restore_checkpoint(folder / "checkpoint-2", state)
        damage = ""
    except StorageError as error:
        damage = str(error)
    return {"said": said, "same": same, "looks": looks, "damage": damage, "file": own[0]}


def two(demo, folder, process):
    """Run SFT until a signal to process 1, then PPO, then runs that are refused; then kill process 0 in a step."""
    from jaxrlhf.errors import Interrupted
    from jaxrlhf.rl.run import train_ppo
    from jaxrlhf.trainers.sft import train_sft

    if process == 1:
        in_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        train_sft(sft_config(demo, folder / "sft", deterministic_check=1))
        stopped = None
    except Interrupted as stop:
        stopped = [str(stop), stop.status]
    train_ppo(ppo_config(demo, folder / "ppo"))
    other = {"learning_rate": 0.5} if process == 1 else {}
    settings = refusal(lambda: train_sft(sft_config(demo, folder / "settings", **other)))
    os.chdir(folder / f"rows-{process}")
    data = refusal(lambda: train_sft(sft_config(demo, folder / "data", data_path=("rows.jsonl",))))
    model = refusal(lambda: train_sft(sft_config(demo, folder / "model", model_name_or_path="lm")))
    facts = {"model": model, "stopped": stopped, "settings": settings, "data": data}
    facts["rewards"] = rewarded(folder / f"rewards-{process}.json")
    facts["saves"] = saves(folder / "saves", process)
    (folder / f"process-{process}.json").write_text(json.dumps(facts))
    if process == 0:
        in_step(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_sft(sft_config(demo, folder / "killed"))


def apart(demo, folder, process):
    """Run SFT at a URL with a local folder of this process alone; the second run loses process 1 in step 4.

    The store does not take the first part of process 1.
    """
    from jaxrlhf.config.remote import RemoteFolder
    from jaxrlhf.errors import StorageError
    from jaxrlhf.runs import mirror, saving
    from jaxrlhf.runs.exchange import Exchange
    from jaxrlhf.trainers.sft import train_sft

    saving.RETRY, mirror.INTERVAL, send = 0.0, 0.2, Exchange.send

    def fail(self, *args):
        Exchange.send = send
        raise StorageError("503 Slow Down")

    Exchange.send = fail
    options = {"working_dir": "work", "max_steps": 4, "export_best": True, "eval_steps": 2}
    os.chdir(folder / f"machine-{process}")
    train_sft(sft_config(demo, os.environ["RUN_URL"] + "/whole", **options))
    (folder / f"process-{process}.json").write_text(json.dumps(os.listdir(".")))
    url = os.environ["RUN_URL"] + "/killed"

    def lose():
        while RemoteFolder(url).read("checkpoint-2/metadata.json") is None:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    if process == 1:
        in_step(4, lose)
    train_sft(sft_config(demo, url, **options))


def again(demo, folder, process):
    """Go on with the run that `apart` has lost, on new machines."""
    from jaxrlhf.trainers.sft import train_sft

    os.chdir(folder / f"new-{process}")
    options = {"working_dir": "work", "max_steps": 4, "export_best": True, "eval_steps": 2, "resume": True}
    train_sft(sft_config(demo, os.environ["RUN_URL"] + "/killed", **options))


def steps(demo, folder, process):
    """Run all three steps at a URL with a local folder of this process alone; VICTIM dies in step 3 of the run STEP."""
    from jaxrlhf.commands.rlhf import train_rlhf
    from jaxrlhf.config.remote import RemoteFolder
    from jaxrlhf.runs import mirror

    mirror.INTERVAL = 0.2
    machine, url, step = folder / f"{os.environ['MACHINE']}-{process}", os.environ["RUN_URL"], os.environ["STEP"]
    machine.mkdir()
    os.chdir(machine)

    def lose():
        while RemoteFolder(f"{url}/{step}").read("checkpoint-1/metadata.json") is None:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    if step and process == int(os.environ["VICTIM"]):
        in_step(3, lose, step)  # the save after step 2 has waited for the one after step 1
    train_rlhf(rlhf_config(demo, url, working_dir="work", resume=True))


def four(demo, folder, process):
    """Run SFT from the checkpoint of one process; then process 2 fails while the others are in a collective."""
    from jax.experimental import multihost_utils

    from jaxrlhf.trainers.sft import train_sft

    train_sft(sft_config(demo, folder / "sft", resume=True))
    if process == 2:
        raise ArithmeticError("bad luck")
    multihost_utils.sync_global_devices("what never comes")


def main():
    role, address, number, process, demo, folder = sys.argv[1:]
    from jaxrlhf import distributed

    options = {"heartbeat_timeout": 200} if role == "steps" else {}  # no loss is found by silence there
    distributed.initialize(coordinator_address=address, num_processes=int(number), process_id=int(process), **options)
    {"two": two, "four": four, "apart": apart, "again": again, "steps": steps}[role](
        json.loads(demo), Path(folder), int(process)
    )


if __name__ == "__main__":
    main()
