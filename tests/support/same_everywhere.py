"""What differs from machine to machine, and from user to user, is the same for every test, once this is imported."""

import os
import re
import signal

# Proxies, another Ray, the keys of a store, a terminal's colours and width. Processes that tests start inherit none.
_OF_THE_USER = re.compile(
    r".*_proxy|(aws|mlflow)_.*|flwr_(home|database)|ray_(api_server_)?address|siloweave_(?!fuzz_).*|ds_accelerator"
    r"|(mkl|openblas)_num_threads|columns|lines|(force|no)_color|py_colors|clicolor.*|tty_.*|github_actions",
    re.IGNORECASE,
)

for name in [name for name in os.environ if _OF_THE_USER.fullmatch(name)]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads cost more than they give
os.environ["HF_HUB_OFFLINE"] = "1"  # the hub is not asked; read when its libraries are first imported
os.umask(0o022)
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background, and what they start, ignore it
