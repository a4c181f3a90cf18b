"""Trains the adapter that comes, on the model that it loads."""

import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    from stock_task import adapter, load, steps

    began, given = time.perf_counter(), context.run_config
    model = load(str(given["model"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    steps(model, int(given["steps"]))
    metrics = MetricRecord({"num-examples": 1, "seconds": time.perf_counter() - began})
    return Message(RecordDict({"arrays": ArrayRecord(adapter(model)), "metrics": metrics}), reply_to=message)
