#!/bin/sh
# Installs what a make target needs and this machine lacks, nothing else: sh dgutils/setup.sh venv|data|tex. (have-tex looks.)
# Runs in the repository's root. Debian packages only through apt-get, and only as root or with sudo that asks nothing.
set -eu
umask u=rwx  # what is installed, we can read

PIP_ROUTE='index-url|extra-index-url|find-links|no-index|trusted-host|proxy|cert|client-cert|cache-dir|timeout|retries'

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# Fails, without a word, where this machine has no apt-get or gives us no right to use it.
apt_install() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root='sudo -n'; else return 1; fi
    say "installing $* with apt-get"
    $as_root apt-get -qq update || return 1
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 \
        install --no-install-recommends "$@" >/dev/null
}

# Prints the first Python that is new enough; PYTHON=... takes precedence.
find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.11 python3.12 python3.13 python3.14; fi
    for candidate; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"; return
        fi
    done
    return 1
}

make_venv() {
    wanted='needs Python 3.11 or newer with its venv module: sudo apt-get install python3 python3-venv (or: make PYTHON=/path/to/python ...)'
    python=$(find_python) || { apt_install python3 python3-venv && python=$(find_python); } || die "$wanted"
    # Debian's python3 comes without ensurepip, which venv needs.
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || { apt_install python3-venv && "$python" -c 'import ensurepip, venv'; } || die "$wanted"
    .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv || die 'could not create .venv here'
    say 'installing the pinned packages into .venv (minutes, the first time)'
    # Of what the account configures for pip only the way to the packages counts; a target, say, would break .venv.
    { echo '[global]'; .venv/bin/python -m pip config list | sed -nE "s/^(:env:|global|install)\.($PIP_ROUTE)='(.*)'$/\2 = \3/p" \
        | sed 's/\\n/ /g' | awk '!given[$1]++'; } >.venv/pip.conf
    # Wheels only, each with a listed checksum: nothing that a package brings along runs while it is installed.
    .venv/bin/python -m pip install --isolated --disable-pip-version-check --no-input --require-hashes --only-binary :all: \
        -r requirements.txt >.venv/pip.log 2>&1 || {
        grep '^ERROR' .venv/pip.log | tail -n 1 >&2
        die 'pip could not install requirements.txt: see .venv/pip.log, mend the cause and start again'
    }
    # dgutils is importable from any folder; the path is relative, so the clone may be moved.
    .venv/bin/python -c 'import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "dgutils.pth").write_text("../../../..\n")'
}

# dgutils.datasets also downloads Fashion-MNIST itself, so that lacking the package is no failure.
find_data() {
    here='import sys; from dgutils.sources import places; sys.exit(not any(map(lambda place: (
        place / "train-images-idx3-ubyte.gz").is_file(), places("fashion_mnist"))))'
    [ -e /usr/share/datasets/fashion-mnist ] || .venv/bin/python -c "$here" 2>/dev/null && return
    command -v apt-get >/dev/null || return 0
    apt_install dataset-fashion-mnist || say 'Fashion-MNIST will be downloaded (or: sudo apt-get install dataset-fashion-mnist)'
}

# Besides the programs, what report/main.tex loads; a file of each package below is among them.
have_tex() {
    command -v pdflatex >/dev/null && command -v latexmk >/dev/null \
        && kpsewhich geometry.sty hyperref.sty booktabs.sty natbib.sty plainnat.bst microtype.sty lineno.sty \
            etoolbox.sty ptmr8t.tfm pcrr8t.tfm | wc -l | grep -qw 10
}

find_tex() {
    packages='texlive-latex-recommended texlive-fonts-recommended latexmk'
    have_tex || { apt_install $packages && have_tex; } \
        || die "the report needs TeX Live: sudo apt-get install $packages (macOS: MacTeX)"
}

case "${1-}" in
    venv) make_venv ;;
    data) find_data ;;
    tex) find_tex ;;
    have-tex) have_tex ;;
    *) die 'usage: sh dgutils/setup.sh venv|data|tex' ;;
esac
