"""Small silos whose rounds leave, with or without noise, so that what left can be attacked. Made in seconds."""

import random
from pathlib import Path

from client_plans import client_plan
from served_models import a_model
from silo_requests import TRUSTED, ask

from configs.schema.silo import SiloConfig
from configs.storage.manifests import Manifest, commit_manifest
from federated.adapters.arrays import to_bytes
from federated.adapters.update_codec import decoded
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from privacy.plan import PlanTerms
from trainer.models.adapters import Adaptation, adapted, adapter_weights
from trainer.models.load import load_model

RANK, ALPHA, CONTEXT = 4, 8.0, 48
NO_NOISE = client_plan(max_grad_norm=1e3, noise_multiplier=1.0, rounds=2, num_clients=5)
WITH_NOISE = PlanTerms(
    sampling_rate=0.1, max_grad_norm=1.0, noise_multiplier=1.0, rounds=2, steps_per_round=2, delta=1e-5
)


def public_base(folder, seed=0):
    """A base model of random weights that says that public text has made it."""
    folder.mkdir(parents=True)
    a_model(folder, chat=False, seed=seed)
    metadata = {"context_length": CONTEXT, "trained_on": "public"}
    commit_manifest(folder, Manifest("model", "made-up", metadata=metadata))
    return folder


def notes(rows, seed=0):
    """Texts that have nothing in common but their letters: a model knows one only if it was trained on it."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh island", k=30)) for _ in range(rows)]


def silo_config(folder, model, texts, **changes):
    """A silo with these texts, half of them held out, that keeps what leaves."""
    state = folder / "state"
    if not state.exists():  # whoever makes it before has the silo draw another split
        state.mkdir(parents=True)
        (state / "split.key").write_bytes(bytes(range(32)))
        (state / "split.key").chmod(0o600)
    (folder / "data.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    silo = {
        "id": "north",
        "dataset_id": "ward",
        "state_dir": str(state),
        "base_model": str(model),
        "public_record_count": len(texts) // 2,
        "keep_released": True,
    }
    policy = {"units": ["record", "client"], "budget_epsilon": 1e4, "budget_delta": 0.1, "max_epsilon_per_run": 1e3}
    return SiloConfig(
        silo={**silo, **changes.get("silo", {})},
        data={"source": str(folder / "data.jsonl"), "held_out_fraction": 0.5, **changes.get("data", {})},
        policy={**policy, "max_sampling_rate": 0.9, **changes.get("policy", {})},
    )


def first_adapter(model):
    """A at random, B zero."""
    whole = adapted(load_model(model), Adaptation(RANK, ALPHA), 0)
    return {name: value.numpy() for name, value in adapter_weights(whole).items()}


def train(silo, plan, run="run-1", rounds=None, learning_rate=0.01, local_steps=30):
    """A whole run of one silo: each round begins with what the one before has made. Returns the last adapter."""
    adapter = first_adapter(Path(silo.config.silo.base_model))
    ask(silo, "reserve", run_id=run, reserve=pb.Reserve(plan=plan.model_dump_json()))
    for number in range(1, (rounds or plan.rounds) + 1):
        asked = pb.Train(
            round=number,
            plan_digest=plan.digest,
            base_model_digest=silo.workbench.base_model.content_digest,
            task="causal",
            adapter_spec=pb.AdapterSpec(rank=RANK, alpha=ALPHA),
            adapter=to_bytes(adapter),
            learning_rate=learning_rate,
            optimizer="adam",
        )
        kind = {"train": asked}
        if plan.unit == "client":
            kind = {"contribute": pb.Contribute(train=asked, local_steps=local_steps, sampling_rate=0.5)}
        reply, _ = ask(silo, f"round-{number}", run_id=run, **kind)
        assert reply.WhichOneof("kind") == "trained", reply
        update = decoded(reply.trained.update, "float32", 2**40)
        adapter = {name: adapter[name] + update[name] for name in adapter}
    ask(silo, "close", run_id=run, close=pb.Close())
    return adapter


def opened(config):
    """The silo, with a coordinator that the tests play."""
    return Silo(config, TRUSTED, bytes(range(32)))
