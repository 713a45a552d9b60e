#!/bin/sh
# Installs EdgeCompose @version@ from this folder, without a network. `sh install.sh --help` shows the options.
set -eu

version='@version@'
platform='@platform@'
glibc='@glibc@'
python_version='@python@'
parts='bin bundle venv install.sh README.txt .edgecompose'

usage() {
    cat <<'END'
Usage: sh install.sh [--prefix DIR] [--python [PYTHON]] [--force]
       sh install.sh --uninstall [--prefix DIR]

Checks every file of this folder against SHA256SUMS, then installs the command and its bundle.

  --prefix DIR       where to; by default $HOME/.local/share/edgecompose, with a link in $HOME/.local/bin
  --python [PYTHON]  add a virtual environment with the Python package, made by PYTHON (default: python3)
  --force            replace an installation, its virtual environment too
  --uninstall        remove an installation, and nothing else
  -h, --help         show this
END
}

say() { printf '%s\n' "install.sh: $*" >&2; }
fail() { say "$*"; exit 1; }
misused() { say "$*"; usage >&2; exit 2; }

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
prefix='' python='' force='' uninstall=''
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -gt 1 ] || misused '--prefix wants a directory'; prefix=$2; shift ;;
        --prefix=*) prefix=${1#*=} ;;
        --python)
            python=python3
            if [ $# -gt 1 ]; then case $2 in -*) ;; *) python=$2; shift ;; esac; fi ;;
        --python=*) python=${1#*=} ;;
        --force) force=yes ;;
        --uninstall) uninstall=yes ;;
        -h | --help) usage; exit 0 ;;
        *) misused "'$1' is unknown" ;;
    esac
    shift
done

link=''
if [ -z "$prefix" ] && [ -n "$uninstall" ] && [ -f "$here/.edgecompose" ]; then
    prefix=$here # the script that an installation keeps of itself
fi
if [ -z "$prefix" ]; then
    [ -n "${HOME:-}" ] || fail 'HOME is not set; say where to with --prefix DIR'
    prefix=$HOME/.local/share/edgecompose
fi
case $prefix in /*) ;; *) prefix=$(pwd -P)/$prefix ;; esac
case $python in /*) ;; */*) python=$(pwd -P)/$python ;; esac
if [ -n "${HOME:-}" ] && [ "$prefix" = "$HOME/.local/share/edgecompose" ]; then
    link=$HOME/.local/bin/edgecompose
fi
is_our_link() { [ -n "$link" ] && [ -h "$link" ] && [ "$(readlink "$link")" = "$prefix/bin/edgecompose" ]; }

if [ -n "$uninstall" ]; then
    [ -f "$prefix/.edgecompose" ] || fail "'$prefix' holds no installation of EdgeCompose; name it with --prefix DIR"
    if is_our_link; then rm -f -- "$link"; fi
    for part in $parts; do rm -rf -- "${prefix:?}/$part"; done
    if rmdir -- "$prefix" 2>/dev/null; then
        say "removed $prefix"
    else
        say "removed; '$prefix' holds other files and stays"
    fi
    exit 0
fi

# What was given, before anything is written.

cd -- "$here"
[ -f SHA256SUMS ] && [ -d bin ] && [ -d bundle ] ||
    fail "'$here' is not the unpacked archive (bin, bundle or SHA256SUMS is missing); unpack it and run its install.sh"
found=$(uname -sm | tr 'A-Z ' 'a-z-')
[ "$found" = "$platform" ] || fail "this archive is for $platform and this machine is $found; get the archive for it"
if [ -n "$python" ]; then
    found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "'$python' is no Python that runs; give another to --python, or install without it"
    [ "$found" = "$python_version" ] ||
        fail "the packages are for Python $python_version and '$python' is $found; give --python one of $python_version"
fi
if [ -f "$prefix/.edgecompose" ]; then
    [ -n "$force" ] ||
        fail "'$prefix' holds an installation already; add --force to replace it, or give another --prefix"
elif [ -d "$prefix" ] && [ -n "$(ls -A -- "$prefix")" ]; then
    fail "'$prefix' holds files that are not EdgeCompose's; give another --prefix"
elif [ -e "$prefix" ] && [ ! -d "$prefix" ]; then
    fail "'$prefix' is not a directory; give another --prefix"
fi
if [ -n "$link" ] && { [ -e "$link" ] || [ -h "$link" ]; } && ! is_our_link; then
    fail "'$link' is another program's; remove it, or give a --prefix, for which no link is made"
fi
if command -v sha256sum >/dev/null; then
    sums() { sha256sum -c SHA256SUMS; }
elif command -v shasum >/dev/null; then
    sums() { shasum -a 256 -c SHA256SUMS; }
else
    fail 'neither sha256sum nor shasum is there to check the files with; install one of them'
fi
say 'checking every file against SHA256SUMS'
if ! checked=$(LC_ALL=C sums 2>/dev/null); then
    printf '%s\n' "$checked" | sed -n 's/: FAILED.*/ differs from SHA256SUMS or is missing/p' >&2
    fail 'files are not as they were packed (see above), nothing was installed; copy the archive again'
fi
listed=$(sed 's/^[0-9a-f]*  //' SHA256SUMS | LC_ALL=C sort)
present=$(find . ! -type d ! -path ./SHA256SUMS | sed 's,^\./,,' | LC_ALL=C sort)
if [ "$listed" != "$present" ]; then
    printf '%s\n' "$present" | while IFS= read -r name; do
        printf '%s\n' "$listed" | grep -Fqx -e "$name" || printf '%s\n' "$name is not listed in SHA256SUMS" >&2
    done
    fail 'there are files that were not packed (see above), nothing was installed; unpack the archive again, alone'
fi

# Copied beside the old, tried, and only then put in its place; whatever fails, all is as it was.

made=''
missing=$prefix
while [ ! -d "$missing" ]; do
    if [ -e "$missing" ] || [ -h "$missing" ]; then # what undo would remove is only what is made below
        fail "'$missing' is not a directory (a file, or a link to nothing); give another --prefix"
    fi
    made=$missing
    missing=$(dirname -- "$missing")
done
new=$prefix/.new.$$ old=$prefix/.old.$$ done='' linked=''
undo() {
    [ -z "$done" ] || return 0
    trap '' HUP INT TERM
    if [ -d "$old" ]; then
        for part in $parts; do
            [ -e "$old/$part.absent" ] || [ -e "$old/$part" ] || continue
            rm -rf -- "${prefix:?}/$part"
            if [ -e "$old/$part" ]; then mv -- "$old/$part" "$prefix/$part"; fi
        done
    fi
    if [ -n "$linked" ]; then rm -f -- "$link"; fi
    rm -rf -- "$new" "$old"
    if [ -n "$made" ]; then rm -rf -- "$made"; fi
    say 'nothing was installed; all is as it was'
}
trap undo EXIT
trap 'exit 130' HUP INT TERM

say "copying to $prefix"
mkdir -p -- "$new" "$old" || fail "'$prefix' cannot be written to; give another --prefix"
cp -R -P bin bundle install.sh README.txt "$new/" || fail "copying to '$prefix' failed; is there room for it?"
printf '%s\n' "$version" >"$new/.edgecompose"
"$new/bin/edgecompose" doctor >"$new/doctor" 2>&1 || {
    cat "$new/doctor" >&2
    fail "the executable does not run here (see above); it is for $platform with a C library (glibc) of $glibc or later"
}
for part in $parts; do
    if [ -e "$prefix/$part" ]; then mv -- "$prefix/$part" "$old/$part"; else : >"$old/$part.absent"; fi
    if [ -e "$new/$part" ]; then mv -- "$new/$part" "$prefix/$part"; fi
done
if [ -n "$python" ]; then
    say "making a virtual environment of the packages in $prefix/venv"
    "$python" -m venv "$prefix/venv" ||
        fail "'$python' cannot make a virtual environment; install its venv module, or install without --python"
    # No setting of this machine's pip may send it to an index.
    PIP_CONFIG_FILE=/dev/null "$prefix/venv/bin/python" -m pip --isolated --disable-pip-version-check --quiet install \
        --no-index --find-links "$here/wheels" "edgecompose[@extras@]==$version" ||
        fail 'installing the packages failed (see above)'
    "$prefix/venv/bin/edgecompose" doctor >/dev/null || fail 'the installed package does not run (see above)'
fi
if [ -n "$link" ] && ! is_our_link; then
    mkdir -p -- "$(dirname -- "$link")"
    ln -s -- "$prefix/bin/edgecompose" "$link" || fail "the link '$link' cannot be made; give a --prefix"
    linked=yes
fi
done=yes
rm -rf -- "$new" "$old"

# As a shell reads it again.
quoted() {
    case $1 in
        *[!A-Za-z0-9_./-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf '%s' "$1" ;;
    esac
}
command=$(quoted "$prefix/bin/edgecompose")
case :${PATH:-}: in *:"${HOME:-}/.local/bin":*) if [ -n "$link" ]; then command=edgecompose; fi ;; esac
cat <<END
EdgeCompose $version is installed. Run it with

    $command run $(quoted "$prefix/bundle") 'Customer review: Great soup. Positive or negative? Answer:'
END
if [ -n "$python" ]; then printf '\nand its Python package with\n\n    %s\n' "$(quoted "$prefix/venv/bin/python")"; fi
printf '\nRemove it with\n\n    sh %s --uninstall\n' "$(quoted "$prefix/install.sh")"
