"""The Flower ServerApp: reads the run's settings from Flower's context and hands over to the coordinator."""

import tomllib
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from configs.parse import parse
from configs.schema.schema import RunConfig
from configs.storage.layout import AGGREGATOR_FOLDER
from federated.coordinator.flower_grid import OneByOne
from federated.coordinator.outcome import recorded
from federated.coordinator.parties import Parties
from federated.coordinator.rehearsal.rehearsal import rehearse
from federated.coordinator.rounds import run_federation
from federated.coordinator.trusted_aggregator import MEMBERS, open_ledger
from federated.identity.trust import coordinator_signer, enrolled_silos
from federated.protocol.framing import LARGEST_MESSAGE_BYTES

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry: the settings come as one TOML text, because a run configuration holds only scalars."""
    given = context.run_config
    config = parse(RunConfig, tomllib.loads(str(given["config"])), "run configuration")
    base_model, directory = Path(str(given["base-model"])), Path(str(given["directory"]))
    home = Path(str(given["coordinator"]))
    ledger = partial(open_ledger, home, home / AGGREGATOR_FOLDER, MEMBERS, config.privacy)
    parties = Parties(coordinator_signer(home), int(given["num-silos"]), partial(enrolled_silos, home), ledger)
    with recorded(directory, context.run_id):
        line = LARGEST_MESSAGE_BYTES
        if given.get("rehearsal"):
            rehearse(OneByOne(grid), config, base_model, directory, parties)
            return
        run_federation(OneByOne(grid), config, base_model, directory, parties, lambda _: None, carries_bytes=line)
