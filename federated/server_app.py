"""The Flower ServerApp: reads the run's settings from Flower's context and hands over to the coordinator."""

import tomllib
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from configs.encryption import load_key
from configs.events import EventLog, Listener
from configs.load import parse
from configs.schema import RunConfig
from federated.adapters import Arrays
from federated.aggregator import FOLDER, MEMBERS, open_ledger
from federated.exchange import Parties
from federated.flower_replies import Nodes, OneByOne
from federated.outcome import recorded
from federated.rounds import Coordinator
from federated.trust import coordinator_signer, enrolled_silos

app = ServerApp()


def run_federation(
    grid: Nodes,
    config: RunConfig,
    base_model: Path,
    directory: Path,
    parties: Parties,
    on_event: Listener,
    *,
    certify: bool = True,
) -> None:
    """Runs a federation over a grid to its end, from its newest commit, and publishes what it has made."""
    from federated.final_model import save_peft, write_card

    directory.mkdir(parents=True, exist_ok=True)
    log = EventLog(directory / "events.jsonl", (on_event,))
    coordinator = Coordinator(grid, config, base_model, directory, parties, log, certify)
    coordinator.run(lambda: initial_adapter(config, base_model))
    adapter = save_peft(config, base_model, directory)
    write_card(directory, coordinator.certify_model(adapter) if certify else None)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry: the settings come as one TOML text, because a run configuration holds only scalars."""
    given = context.run_config
    config = parse(RunConfig, tomllib.loads(str(given["config"])), "run configuration")
    base_model, directory = Path(str(given["base-model"])), Path(str(given["directory"]))
    home = Path(str(given["coordinator"]))
    ledger = partial(open_ledger, home, home / FOLDER, MEMBERS, config.privacy)
    parties = Parties(coordinator_signer(home), int(given["num-silos"]), partial(enrolled_silos, home), ledger)
    with recorded(directory, context.run_id):
        run_federation(OneByOne(grid), config, base_model, directory, parties, lambda _: None)


def initial_adapter(config: RunConfig, base_model: Path) -> Arrays:
    """The adapter before the first round: A at random from the run's seed, B zero."""
    from trainer.models import adapter_weights, add_adapter, load_model

    federated = config.federated
    base = load_model(base_model, load_key(config.run.encryption_key_file))
    model = add_adapter(base, federated.lora_rank, federated.lora_alpha, config.run.seed)
    return {name: weight.numpy() for name, weight in adapter_weights(model).items()}
