"""What travels twice where a line is slow and gets cut, or the relay is killed.

python benchmarks/cut_link.py --mebibytes 168 --mbit 10 --cut-s 30 --json cut.json
python benchmarks/cut_link.py --mebibytes 168 --mbit 10 --kills 10 --json killed.json

One request of that size, and a reply of the same size, between a SuperLink (Flower's, over TLS) and a relay's node in a
process of its own, through an HTTP proxy in this process that is as slow as said in each direction and ends all
connections every so often. The silo is a service that turns the bytes round, so no time is a model's.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from figures import setting

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
WAIT_S = 3600.0


def measured(mebibytes: int, mbit: float, cut_s: float, kills: int) -> dict[str, Any]:
    """One exchange: its bytes by those of request and reply, its seconds, and what became of it."""
    from cut_line import CutLine
    from flower_link import FlowerLink

    from federated.coordinator.flower_grid import OneByOne
    from federated.protocol import silo_pb2 as pb
    from federated.transport.service import serve

    size, asked = mebibytes * 2**20, list[bytes]()

    def handle(envelope: bytes) -> bytes:
        body = pb.Envelope.FromString(envelope).body
        asked.append(body)
        return pb.Envelope(body=pb.Reply(trained=pb.Trained(update=body[::-1])).SerializeToString()).SerializeToString()

    with tempfile.TemporaryDirectory(prefix="cut-") as name:
        folder = Path(name)
        server, _ = serve(handle, 2 * size, f"unix:{folder}/s.sock")
        link = FlowerLink(folder, f"unix:{folder}/s.sock")
        with CutLine(link.port, cut_s=cut_s, bytes_per_s=mbit * 1e6 / 8, connects=True) as line:
            proxy = {"HTTPS_PROXY": f"http://127.0.0.1:{line.port}", "NO_PROXY": ""}
            link.start_node(link.port, **proxy)
            nodes = OneByOne(link.grid)
            while not list(nodes.get_node_ids()):
                time.sleep(0.1)
            before, cuts, began = line.moved, line.cuts, time.monotonic()
            ended, killed = threading.Event(), list[int]()

            def kill() -> None:
                for number in range(1, kills + 1):
                    while line.moved - before < number * 2 * size / (kills + 1):
                        if ended.wait(0.02):
                            return
                    link.kill_node()
                    killed.append(line.moved - before)
                    link.start_node(link.port, **proxy)

            killer = threading.Thread(target=kill)
            killer.start()
            reply = exchanged(nodes, link.node_id, os.urandom(size))
            seconds = time.monotonic() - began
            ended.set()
            killer.join()
            result = {
                "mebibytes": mebibytes,
                "mbit_per_s": mbit,
                "cut_every_s": cut_s,
                "cuts": line.cuts - cuts,
                "kills": len(killed),
                "bytes_by_payload": round((line.moved - before) / (2 * size), 4),
                "seconds": round(seconds, 1),
                "seconds_by_line": round(seconds / (2 * size * 8 / (mbit * 1e6)), 3),
                "lost_rounds": int(reply is None or reply.trained.update != asked[0][::-1]),
                "spends": len(set(asked)),
            }
        link.end()
        server.stop(None).wait()
    return result


def exchanged(nodes: Any, node: int, body: bytes) -> Any:
    """The reply; None where there is none."""
    from flwr.app import Message

    from federated.protocol import silo_pb2 as pb
    from federated.transport.flower_messages import pack, unpack

    content = pack(pb.Envelope(body=body).SerializeToString(), body, in_pieces=True)
    (name,) = nodes.push_messages([Message(content, node, "train", group_id="1", ttl=WAIT_S)])
    while True:
        for reply in nodes.pull_messages([name]):
            list(nodes.pull_messages([]))
            if reply.has_error():
                print(reply.error, file=sys.stderr)
                return None
            return pb.Reply.FromString(pb.Envelope.FromString(unpack(reply.content)).body)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=16)
    parser.add_argument("--mbit", type=float, default=40, help="of the line, in each direction")
    parser.add_argument("--cut-s", type=float, default=0, help="the line is cut so often; 0: never")
    parser.add_argument("--kills", type=int, default=0, help="the relay is killed so often, evenly over the bytes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured(options.mebibytes, options.mbit, options.cut_s, options.kills)
    result = {**setting(["siloweave", "flwr", "httpx"]), **found}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
