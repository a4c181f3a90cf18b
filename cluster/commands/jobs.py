"""``siloweave submit`` and ``siloweave job``: the pipeline's commands as jobs of a Ray cluster."""

from datetime import datetime
from functools import partial
from typing import Annotated, Any

import typer

from cluster.commands import stages
from cluster.commands.evaluate import evaluate
from cluster.commands.generate import generate
from cluster.commands.tune import tune
from cluster.runtime import jobs
from configs.errors import InputError
from configs.load import load
from configs.printing import say, stream, to_json
from configs.schema.schema import RunConfig

STAGES = (
    stages.demo,
    stages.prepare,
    stages.pretrain,
    stages.export,
    stages.federate,
    evaluate,
    generate,
    stages.report,
    stages.audit,
    stages.plan,
    stages.doctor,
    tune,
)
ServerOption = Annotated[
    str, typer.Option(help="Job server of the cluster, http://HOST:PORT. Default: RAY_API_SERVER_ADDRESS.")
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="Id that `siloweave submit` gave.")]

job_app = typer.Typer(help="Jobs on a Ray cluster.", no_args_is_help=True)


def submit(
    command: Annotated[list[str], typer.Argument(help="After `--`: a command of the pipeline and its options.")],
    address: ServerOption = "",
    python: Annotated[str, typer.Option(help="Interpreter on the nodes, with the dependencies installed.")] = "python",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Don't wait for the job's end.")] = False,
    as_json: stages.JsonOption = False,
) -> None:
    """Runs a command on a Ray cluster, shows its output, and ends with its exit status; continues when given again."""
    config, words = _resolve(command)
    jobs.check_movable(words[0], config)
    cluster = jobs.Jobs(address)
    job = cluster.submit(config, words, python)
    say(f"job {job} at {cluster.address}: `siloweave job stop {job}` ends it, ending this command does not", err=True)
    if no_wait:
        say(to_json(cluster.details(job)) if as_json else job)
        return
    _end(cluster.follow(job, partial(stream, err=as_json)), as_json)


@job_app.command()
def status(job: JobArgument, address: ServerOption = "", as_json: stages.JsonOption = False) -> None:
    """What the cluster knows of a job."""
    _show(jobs.Jobs(address).details(job), as_json)


@job_app.command()
def stop(job: JobArgument, address: ServerOption = "", as_json: stages.JsonOption = False) -> None:
    """Ends a job; what it has committed stays, and the same submission continues from there."""
    _show(jobs.Jobs(address).stop(job), as_json)


@job_app.command()
def logs(
    job: JobArgument,
    address: ServerOption = "",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it ends; end with its exit status.")] = False,
    as_json: stages.JsonOption = False,
) -> None:
    """What a job has printed."""
    cluster = jobs.Jobs(address)
    if follow:
        cluster.details(job)  # an unknown id is one clear line; the stream would only close
        _end(cluster.follow(job, partial(stream, err=as_json)), as_json)
    else:
        text = cluster.logs(job)
        stream(f"{to_json({'job': job, 'logs': text})}\n" if as_json else text)


def _resolve(command: list[str]) -> tuple[RunConfig, list[str]]:
    """The settings of a command, read here, and the command without the options that gave them.

    Raises:
        InputError: not a command of the pipeline, or its settings are wrong.
    """
    stages = typer.Typer()
    for stage in STAGES:
        stages.command()(stage)
    group: Any = typer.main.get_command(stages)
    name, *arguments = command
    if name not in group.commands:
        raise InputError(f"{name!r} can't be submitted; give one of {', '.join(group.commands)}")
    parser = group.commands[name]
    given = parser.make_context(name, list(arguments)).params
    words = [name]
    for option in parser.params:
        value = given.get(option.name)
        if option.name in ("config", "override", "address") or value in (None, False, "") or value == option.default:
            continue
        several = value if isinstance(value, list | tuple) else [value]
        words += [option.opts[0]] if value is True else [f"{option.opts[0]}={one}" for one in several]
    if given.get("address"):
        raise InputError(f"--address {given['address']!r} after `--`: give it before, as the job server's")
    return load(given["config"], given["override"] or [], elsewhere=True), words


def _end(details: dict[str, Any], as_json: bool) -> None:
    """Says how a job ended, and ends the same way."""
    if as_json:
        say(to_json(details))
    elif details["exit_status"]:
        reason = f": {details['message'].splitlines()[0]}" if details["message"] else "; its log is above"
        line = f"job {details['job']} {details['status']}, exit status {details['exit_status']}{reason}"
        say(f"error: {line}", err=True)
    raise typer.Exit(details["exit_status"])


def _show(details: dict[str, Any], as_json: bool) -> None:
    if as_json:
        say(to_json(details))
        return
    times = {name: datetime.fromtimestamp(details[name]).astimezone() for name in ("started", "ended") if details[name]}
    shown = {**details, **{name: when.isoformat(timespec="seconds") for name, when in times.items()}}
    say(*(f"{name}: {value}" for name, value in shown.items() if value not in (None, "")))
