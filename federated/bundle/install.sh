#!/bin/sh
# Checks this folder, and installs Siloweave from it alone: Python's venv, openssl and coreutils are needed, no network.
#
#   sh install.sh FINGERPRINT            checks that everything here is as the coordinator has signed it
#   sh install.sh FINGERPRINT TARGET     the same, and then makes the environment TARGET, such as /opt/siloweave
#
# FINGERPRINT is the coordinator's, which its people read out to you, by telephone for instance.
set -eu
LC_ALL=C
export LC_ALL

fail() {
    printf 'error: %s\n' "$(printf %s "$1" | tr -d '\000-\037\177')" >&2
    exit 2
}

[ $# -eq 1 ] || [ $# -eq 2 ] || fail "usage: sh install.sh FINGERPRINT [TARGET]; the coordinator's people read the fingerprint out"
given=$1
target=${2:-}
case $target in
'' | /*) ;;
*) target=$(pwd)/$target ;;
esac
[ -z "$target" ] || [ ! -e "$target" ] || fail "$target: is there already; give a folder that is not"
cd "$(dirname "$0")"
for tool in openssl sha256sum find comm mktemp; do
    command -v "$tool" >/dev/null || fail "$tool: not installed; the check needs it"
done
openssl pkeyutl -help 2>&1 | grep -q rawin || fail "openssl: too old to check this signature; version 3 is needed"
for file in bundle.json coordinator.json SHA256SUMS SHA256SUMS.sig; do
    [ -f "$file" ] || fail "$file: missing; copy the whole bundle again"
done

# Only what to look for is read before the signature is checked.
wanted=$(sed -n 's/^ *"python": "\(3\.[0-9]*\)",*$/\1/p' bundle.json)
machine=$(sed -n 's/^ *"machine": "\([a-z0-9_]*\)",*$/\1/p' bundle.json)
[ -n "$wanted" ] && [ -n "$machine" ] || fail "bundle.json: not as siloweave writes it; copy the bundle again"
[ "$(uname -s)" = Linux ] || fail "this bundle is for Linux, not $(uname -s)"
[ "$(uname -m)" = "$machine" ] || fail "this bundle is for processors of the kind $machine, not $(uname -m); ask for one made on such a machine"
python=$(command -v "python$wanted") && "$python" -I -c "" 2>/dev/null ||
    fail "this bundle is for Python $wanted, which is not installed; install it, or ask for a bundle for another one"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# What is checked is what is installed: pip gets these copies, which name the digest of each wheel.
cp SHA256SUMS SHA256SUMS.sig coordinator.json requirements.txt "$work/" 2>/dev/null || fail "the bundle is not whole; copy it again"

# The same bytes that `siloweave silo trust` and a relay's coordinator_fingerprint are about.
"$python" -I - "$work" <<'PYTHON' || fail "coordinator.json: no coordinator's card; copy the bundle again"
import hashlib, json, pathlib, sys

work = pathlib.Path(sys.argv[1])
card = json.loads((work / "coordinator.json").read_bytes())
content = json.dumps(card, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
(work / "fingerprint").write_text(hashlib.sha256(content).hexdigest()[:40])
# An Ed25519 key as RFC 8410 writes it.
(work / "key.der").write_bytes(bytes.fromhex("302a300506032b6570032100" + card["public_key"]))
PYTHON
found=$(cat "$work/fingerprint")
said=$(printf %s "$given" | tr -d ' -' | tr 'A-F' 'a-f')
[ "$said" = "$found" ] || fail "coordinator.json: its fingerprint is $(printf %s "$found" | sed 's/..../&-/g; s/-$//'), not $given; ask the coordinator's people for the bundle again"
openssl pkeyutl -verify -pubin -keyform DER -inkey "$work/key.der" -rawin -in "$work/SHA256SUMS" -sigfile "$work/SHA256SUMS.sig" >/dev/null 2>&1 ||
    fail "SHA256SUMS: not signed by this coordinator; copy the bundle again, or ask for another one"
[ "$(head -n 1 "$work/SHA256SUMS")" = "# siloweave bundle 1" ] || fail "SHA256SUMS: of another version of siloweave than this install.sh; copy the bundle again"
[ -z "$(find . ! -type f ! -type d)" ] || fail "$(find . ! -type f ! -type d | head -n 1): neither a file nor a folder; copy the bundle again"
sed -n 's/^[0-9a-f]\{64\}  /.\//p' "$work/SHA256SUMS" | sort >"$work/signed"
find . -type f ! -path ./SHA256SUMS ! -path ./SHA256SUMS.sig | sort >"$work/there"
comm -13 "$work/signed" "$work/there" >"$work/more"
[ ! -s "$work/more" ] || fail "$(head -n 1 "$work/more"): not of the bundle; remove it"
comm -23 "$work/signed" "$work/there" >"$work/fewer"
[ ! -s "$work/fewer" ] || fail "$(head -n 1 "$work/fewer"): missing; copy the bundle again"
sha256sum --check --strict --quiet "$work/SHA256SUMS" >"$work/changed" 2>/dev/null ||
    fail "$(sed -n '1s/: [A-Za-z ]*$//p' "$work/changed"): not as it was signed; copy the bundle again"
listed=$(sed -n 's/^\([0-9a-f]*\)  requirements.txt$/\1/p' "$work/SHA256SUMS")
[ "$(sha256sum <"$work/requirements.txt")" = "$listed  -" ] || fail "requirements.txt: not as it was signed; copy the bundle again"
version=$(sed -n 's/^ *"siloweave": "\(.*\)",*$/\1/p' bundle.json)
made=$(sed -n 's/^ *"made": "\(.*\)",*$/\1/p' bundle.json)
echo "$(wc -l <"$work/signed") files are as the coordinator with fingerprint $given has signed them: siloweave $version, made $made"
[ -n "$target" ] || exit 0

"$python" -I -m venv -h >/dev/null 2>&1 && "$python" -I -c 'import ensurepip' 2>/dev/null ||
    fail "python$wanted: its venv is not installed (of Debian: python$wanted-venv)"
trap 'rm -rf "$work" "$target"' EXIT
"$python" -I -m venv "$target" || fail "$target: no environment can be made there"
"$target/bin/python" -I -m pip install --isolated --quiet --no-index --no-deps --disable-pip-version-check --no-cache-dir \
    --find-links wheels --require-hashes --requirement "$work/requirements.txt" ||
    fail "pip could not install the wheels; its reason is above"
trap 'rm -rf "$work"' EXIT
echo "installed: $target/bin/siloweave; next: docs/deployment.md, section 3; the base model is in model/, the units in deploy/"
