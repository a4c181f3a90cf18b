"""A Ray of our own starts what is used, and nothing else."""

import psutil


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def test_embedded_ray_has_no_dashboard_server_and_no_monitors(shared_ray):
    commands = [command_of(process) for process in psutil.Process().children(recursive=True)]
    assert any("raylet" in command for command in commands)
    assert not [command for command in commands if "dashboard.py" in command or "monitor.py" in command]


def test_what_ray_starts_is_left_as_it_was(shared_ray):
    from ray._private import node, services

    for function in (services.start_api_server, node.Node.start_monitor, node.Node.start_log_monitor):
        assert function.__module__.startswith("ray._private")
