"""What a relay's user can reach, by the permissions of real files; the operating system itself is the oracle."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from configs.errors import InputError
from configs.load import load
from configs.schema.places import named_places
from federated.deployment.separation import separation
from federated.deployment.separation.account import ENTER, READ, WRITE, Account
from federated.deployment.separation.separation import check_separation, share_socket
from federated.simulation.simulated_places import simulated_silo

NOBODY = "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def nobody_can(action):
    """Whether the operating system lets the other user do it."""
    group = str(pwd.getpwnam(NOBODY).pw_gid)
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={group}", "--init-groups", "sh", "-c", action]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def silo(tmp_path):
    """A silo whose every file is closed, below folders that everyone may enter."""
    config = simulated_silo(load("tiny"), "roman", tmp_path / "model")
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "silo.key").write_bytes(b"secret")
    (tmp_path / "state" / "silo.key").chmod(0o600)
    (tmp_path / "state.anchor").mkdir(mode=0o700)
    for name in ("silo.toml", "records.jsonl"):
        (tmp_path / name).write_text("private")
        (tmp_path / name).chmod(0o600)
    settings = {"state_dir": str(tmp_path / "state"), "relay_user": NOBODY}
    data = {"source": str(tmp_path / "records.jsonl"), "public": False}
    return config.model_copy(
        update={
            "silo": config.silo.model_copy(update=settings),
            "data": config.data.model_copy(update=data),
        }
    )


@pytest.fixture
def opened(tmp_path):
    """Lets others down to the test's folder, as far as it is ours; restores it after."""
    before = {}
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            before[folder] = folder.stat().st_mode
            folder.chmod(folder.stat().st_mode | 0o001)
    yield tmp_path
    for folder, mode in before.items():
        folder.chmod(mode)


@pytest.fixture(autouse=True)
def files_alone(monkeypatch):
    """The installed code is looked at by the test that is about it, in a process of its own: it is many files."""
    monkeypatch.setattr(separation, "_check_code", lambda reach: None)


def refused(silo, tmp_path):
    try:
        check_separation(silo, tmp_path / "silo.toml")
    except InputError as error:
        return str(error)
    return ""


def changed(silo, group, **values):
    return silo.model_copy(update={group: getattr(silo, group).model_copy(update=values)})


def test_a_closed_silo_is_accepted(silo, opened):
    assert refused(silo, opened) == ""


@pytest.mark.parametrize(
    ("path", "mode", "said"),
    [
        ("silo.toml", 0o604, "can read {path} (the policy)"),
        ("records.jsonl", 0o604, "can read {path} (the data)"),
        ("records.jsonl", 0o602, "can change {path} (the data)"),
        ("state", 0o702, "can change {path} (keys and ledger)"),
        ("state.anchor", 0o707, "can change {path} (the ledger's anchor)"),
    ],
)
def test_each_thing_within_reach_is_named(silo, opened, path, mode, said):
    (opened / path).chmod(mode)
    assert said.format(path=opened / path) in refused(silo, opened)


def test_a_key_in_a_folder_that_can_be_entered_is_found(silo, opened):
    (opened / "state").chmod(0o701)
    assert refused(silo, opened) == ""  # the file itself is closed
    (opened / "state" / "silo.key").chmod(0o604)
    assert f"can read {opened / 'state' / 'silo.key'} (keys and ledger)" in refused(silo, opened)


def test_a_link_is_followed_to_what_it_names(silo, opened):
    (opened / "state").chmod(0o701)
    (opened / "elsewhere").write_text("secret")
    (opened / "elsewhere").chmod(0o604)
    (opened / "state" / "link").symlink_to(opened / "elsewhere")
    assert f"can read {opened / 'elsewhere'}" in refused(silo, opened)


def test_a_folder_above_that_can_be_changed_is_found(silo, opened):
    opened.chmod(0o703)
    assert f"can replace what is in {opened}" in refused(silo, opened)


def test_the_services_own_user_and_root_are_no_relay(silo, tmp_path):
    own = pwd.getpwuid(os.geteuid()).pw_name
    for user in (own, "root"):
        other = silo.model_copy(update={"silo": silo.silo.model_copy(update={"relay_user": user})})
        assert "neither root nor the service's" in refused(other, tmp_path)


def test_a_user_who_is_not_there_is_named(silo, tmp_path):
    other = silo.model_copy(update={"silo": silo.silo.model_copy(update={"relay_user": "no-such-user"})})
    assert "no such user" in refused(other, tmp_path)


# What the settings name


def test_each_place_is_listed_with_its_value(silo):
    assert len(list(named_places(silo))) == 7
    assert ("the data", silo.data.source) in [(place.what, value) for place, value in named_places(silo)]


@as_root
@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("encryption_key_file", "the encryption key"),
        ("names_file", "the names"),
        ("anchor_dir", "the ledger's anchor"),
        ("source", "the data"),
        ("hugging_face_source", "the data"),
    ],
)
def test_every_file_that_a_setting_names_is_looked_at(silo, opened, setting, what, monkeypatch):
    """Before: de-identification's list of patients' names, and private data as `hf:FOLDER`, were read by the relay."""
    monkeypatch.setattr(separation, "_copies", list)
    path = opened / "named"
    path.write_text("patient 7")
    path.chmod(0o604)
    if setting.endswith("source"):
        silo = changed(silo, "data", source=f"hf:{path}" if "hugging" in setting else str(path))
    elif setting == "names_file":
        deidentify = silo.data.deidentify.model_copy(update={setting: str(path)})
        silo = changed(silo, "data", deidentify=deidentify)
    else:
        silo = changed(silo, "silo", **{setting: str(path)})
    assert nobody_can(f"cat '{path}'")
    assert f"can read {path} ({what})" in refused(silo, opened)
    path.chmod(0o600)
    assert refused(silo, opened) == ""


@as_root
def test_where_each_datasets_ledger_is_only_the_service_says(silo, opened, monkeypatch):
    """A relay that could change it could have the ledger begun anew in another folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(opened))
    folder, what = opened / "siloweave", "(where each dataset's ledger is)"
    folder.mkdir(mode=0o755)
    assert refused(silo, opened) == ""
    (folder / "datasets.json").write_text("{}")
    (folder / "datasets.json").chmod(0o600)
    folder.chmod(0o757)
    assert nobody_can(f"mv '{folder}/datasets.json' '{folder}/gone' && mv '{folder}/gone' '{folder}/datasets.json'")
    assert f"can replace what is in {folder} {what}" in refused(silo, opened)
    folder.chmod(0o755)
    (folder / "datasets.json").chmod(0o604)
    assert f"can read {folder / 'datasets.json'} {what}" in refused(silo, opened)
    (folder / "datasets.json").chmod(0o600)
    assert refused(silo, opened) == ""
    public = changed(silo, "data", public=True)
    folder.chmod(0o757)
    assert what not in refused(public, opened)


@as_root
def test_copies_that_the_hugging_face_libraries_keep_are_closed(silo, opened, monkeypatch):
    """Before: private data as `hf:FOLDER` was copied to ~/.cache/huggingface, where everybody read it."""
    folder = opened / "records"
    folder.mkdir(mode=0o700)
    cache, fresh = opened / "cache", opened / "fresh" / "hub"
    cache.mkdir(mode=0o755)
    (cache / "data.arrow").write_text("patient 7")
    monkeypatch.setattr(separation, "_copies", lambda: [cache, fresh])
    private = changed(silo, "data", source=f"hf:{folder}")
    assert nobody_can(f"cat '{cache}/data.arrow'")
    assert f"can read {cache} (a copy of the data)" in refused(private, opened)
    cache.chmod(0o700)
    assert refused(private, opened) == ""
    assert fresh.stat().st_mode & 0o777 == 0o700  # made closed, before a library makes it open
    cache.chmod(0o755)
    assert refused(changed(private, "data", public=True), opened) == ""


def test_the_folders_of_the_hugging_face_libraries_are_those_that_they_use(tmp_path):
    code = "from trainer.data.reading.hugging_face import hugging_face_folders as f; print(*f(), sep=chr(10))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "data")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert {str(tmp_path / "home"), str(tmp_path / "data"), str(tmp_path / "home" / "hub")} <= set(done.stdout.split())


def test_a_state_folder_that_is_missing_is_made_closed(silo, opened):
    """Before: it was accepted, and then made as the umask has it: the ledger in it was everybody's to read."""
    before = os.umask(0o022)
    try:
        other = changed(silo, "silo", state_dir=str(opened / "new" / "state"))
        assert refused(other, opened) == ""
    finally:
        os.umask(before)
    for folder in (opened / "new" / "state", opened / "new" / "state.anchor"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_one_line(silo, opened):
    (opened / "file").write_text("")
    other = changed(silo, "silo", anchor_dir=str(opened / "file" / "anchor"))
    assert f"{opened / 'file' / 'anchor'}: can't be made (Not a directory); make it" in refused(other, opened)


@as_root
@pytest.mark.parametrize("model", ["base_model", "spacy_model"])
def test_a_model_may_be_read_and_not_changed(silo, opened, model):
    folder = opened / "public"
    folder.mkdir()
    (folder / "weights").write_text("public")
    folder.chmod(0o755)
    (folder / "weights").chmod(0o644)
    if model == "base_model":
        silo = changed(silo, "silo", base_model=str(folder))
    else:
        silo = changed(silo, "data", deidentify=silo.data.deidentify.model_copy(update={model: str(folder)}))
    assert refused(silo, opened) == ""
    (folder / "weights").chmod(0o646)
    assert nobody_can(f": >> '{folder}/weights'")
    assert f"can change {folder / 'weights'}" in refused(silo, opened)


# The way


@as_root
def test_every_link_on_the_way_is_looked_at(silo, opened):
    """Before: of a chain of links only the two ends were; who could change the middle chose the data."""
    middle = opened / "middle"
    middle.mkdir(mode=0o755)
    middle.chmod(0o755)
    (opened / "first").symlink_to(middle / "second")
    (middle / "second").symlink_to("../records.jsonl")
    silo = changed(silo, "data", source=str(opened / "first"))
    assert refused(silo, opened) == ""
    middle.chmod(0o777)
    assert nobody_can(f"ln -sfn /etc/passwd '{middle}/second'")
    assert f"can replace what is in {middle} (the data)" in refused(silo, opened)


@as_root
@pytest.mark.parametrize("kind", ["a folder", "a link"])
def test_a_step_that_is_the_relays_own_is_found_also_in_a_sticky_folder(silo, opened, kind):
    sticky = opened / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    uid = pwd.getpwnam(NOBODY).pw_uid
    if kind == "a link":
        (sticky / "step").symlink_to(opened)
    else:
        (sticky / "step").mkdir(mode=0o755)
        shutil.copy(opened / "records.jsonl", sticky / "step")
    os.chown(sticky / "step", uid, -1, follow_symlinks=False)
    silo = changed(silo, "data", source=str(sticky / "step" / "records.jsonl"))
    assert nobody_can(f"mv '{sticky}/step' '{sticky}/other' && mv '{sticky}/other' '{sticky}/step'")
    assert f"{sticky / 'step'} (the data)" in refused(silo, opened)


@as_root
def test_a_place_that_is_missing_where_the_relay_could_make_it_is_found(silo, opened):
    sticky = opened / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    silo = changed(silo, "data", source=str(sticky / "later.jsonl"))
    assert f"can make later.jsonl in {sticky}" in refused(silo, opened)
    (opened / "loop").symlink_to("loop")
    assert "more than 40 links" in refused(changed(silo, "data", source=str(opened / "loop")), opened)


def test_a_folder_that_links_to_itself_is_looked_at_once(silo, opened):
    (opened / "state").chmod(0o701)
    (opened / "state" / "again").symlink_to(".")
    assert refused(silo, opened) == ""


# The code


@as_root
def test_python_imports_nothing_from_a_folder_that_it_may_not_list(opened):
    """Which is why the walk may pass such a folder over: a service's current folder may be one."""
    folder = opened / "entered"
    folder.mkdir()
    (folder / "hidden.py").write_text("")
    (folder / "hidden.py").chmod(0o644)
    command = f"cd / && PYTHONPATH={folder} /usr/bin/env python3 -S -c 'import hidden'"
    if not nobody_can("/usr/bin/env python3 -S -c 'import json'"):
        pytest.skip("the other user can't run Python here")
    for mode, found in ((0o755, True), (0o711, False)):
        folder.chmod(mode)
        assert nobody_can(command) == found


CODE = """
import os, pathlib, sys
from federated.deployment.separation import separation
from federated.deployment.separation.account import Account
from federated.deployment.separation.reach import Reach
from configs.errors import InputError

def say():
    try:
        separation._check_code(Reach(Account.of("nobody")))
        print("accepted")
    except InputError as error:
        print(error)

say()
for path, mode in zip(sys.argv[1::2], sys.argv[2::2]):
    path, before = pathlib.Path(path), os.stat(path).st_mode
    path.chmod(int(mode, 8))
    say()
    path.chmod(before)
"""


@as_root
def test_code_that_the_relay_could_change_is_found_wherever_it_is(opened):
    """Before: a noise.py that everybody may write was accepted, and so were all folders but the topmost.

    Later before: a sticky folder, an archive, a package without __init__.py, compiled files, what a link names, and
    libraries. A copy of our packages on PYTHONPATH, beside a folder of others'; the environment's own files are walked
    once.
    """
    home, other, archive, native = (opened / name for name in ("home", "other", "code.zip", "native"))
    ours = ("configs", "trainer", "privacy", "federated", "cluster")
    for package in ours:
        shutil.copytree(REPOSITORY / package, home / package, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "package").mkdir(parents=True)
    (other / "package" / "__init__.py").write_text("")
    for folder in ("google/protobuf/later", "package", "__pycache__", "../elsewhere", "../native", "../early"):
        (other / folder).mkdir(parents=True, exist_ok=True)
        (other / folder / "inner.py").write_text("")
    (other / "linked.py").symlink_to("../elsewhere/inner.py")
    (other / "not-importable").mkdir()
    (other / "not-importable" / "shared").mkdir()
    archive.write_text("")
    for path in opened.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (other / "not-importable" / "shared").chmod(0o777)
    attacks = {
        home / "privacy" / "mechanism" / "noise.py": "646",
        home / "privacy": "757",
        home: "757",
        other: "1757",
        other / "package": "757",
        other / "package" / "inner.py": "646",
        archive: "646",
        other / "google" / "protobuf" / "later" / "inner.py": "646",
        other / "google" / "protobuf": "757",
        other / "__pycache__" / "inner.py": "646",
        opened / "elsewhere" / "inner.py": "646",
        native: "1757",
        opened / "early" / "inner.py": "646",
    }
    arguments = [str(item) for attack in attacks.items() for item in attack]
    environment = {**os.environ, "PYTHONPATH": f"{home}:{other}:{archive}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"LD_LIBRARY_PATH": f"{native}:", "LD_PRELOAD": f"unknown.so {opened}/early/inner.py"}
    command = [sys.executable, "-P", "-c", CODE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=home)
    first, *said = done.stdout.splitlines()
    assert first == "accepted"
    for path, line in zip(attacks, said, strict=True):
        what = {"native": "the libraries of LD_LIBRARY_PATH", "early": "the libraries of LD_PRELOAD"}
        place = path.relative_to(opened).parts[0]
        assert f"{path} ({what.get(place, 'the installed code')})" in line


def test_libraries_by_a_name_that_is_not_known_here_are_refused(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/$LIB")
    with pytest.raises(InputError, match=r"LD_LIBRARY_PATH: is '/opt/\$LIB'.*give folders in full"):
        list(separation._libraries())


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o604, 0o602, 0o640, 0o660, 0o606, 0o000])
@pytest.mark.parametrize("group", [0, None], ids=["root's group", "the user's group"])
def test_permissions_are_those_that_the_system_gives(opened, mode, group):
    """Against the operating system itself: the same file opened by the user."""
    entry = pwd.getpwnam(NOBODY)
    path: Path = opened / "file"
    path.write_text("x")
    os.chown(path, 0, entry.pw_gid if group is None else group)
    path.chmod(mode)
    account = Account.of(NOBODY)
    for wanted, action in ((READ, f"cat '{path}'"), (WRITE, f": >> '{path}'")):
        assert account.may(path, wanted) == nobody_can(action), (oct(mode), action)
    assert account.may(opened, ENTER)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another group")
def test_a_socket_is_shared_and_its_folder_only_where_the_relay_could_not_enter(opened):
    """A folder that others use as well, such as /run, stays as it is."""
    relay = Account.of(NOBODY)
    own, common, full = (opened / name for name in ("own", "common", "full"))
    for folder, mode in ((own, 0o700), (common, 0o755), (full, 0o700)):
        folder.mkdir()
        folder.chmod(mode)
        (folder / "silo.sock").touch(mode=0o600)
    (full / "another").touch()
    for folder in (own, common):
        share_socket(folder / "silo.sock", NOBODY)
        status = (folder / "silo.sock").stat()
        assert (status.st_mode & 0o777, status.st_gid) == (0o660, relay.gid)
    assert (own.stat().st_mode & 0o777, own.stat().st_gid) == (0o750, relay.gid)
    assert (common.stat().st_mode & 0o777, common.stat().st_gid) == (0o755, 0)
    with pytest.raises(InputError, match="it holds other files"):
        share_socket(full / "silo.sock", NOBODY)
    assert full.stat().st_mode & 0o777 == 0o700
