"""FedAvg by Flower's own strategy; writes how long its rounds took."""

import json
import time
from itertools import pairwise
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from stock_task import adapter, load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    given = context.run_config
    initial = ArrayRecord(adapter(load(str(given["model"]))))
    ends: list[float] = []

    def note(_round: int, _arrays: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2)
    strategy.start(grid, initial, num_rounds=int(given["rounds"]), evaluate_fn=note)
    rounds = [end - begin for begin, end in pairwise(ends)]
    Path(str(given["to"])).write_text(json.dumps({"round": rounds}))
