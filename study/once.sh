# Sourced by speedrun.sh and study/paper.sh: finished work is not repeated.
# RUN starts a script: python, or torchrun with its flags.

# finished FOLDER: whether the newest checkpoint of a stage is its last one. The exit status does
# not say so: a stage that is stopped saves a checkpoint and exits with 0, too.
finished() {
  local run=$1/latest/run.json
  # `latest` may be a file with the name of the step, or missing in a copy.
  [ -e "$run" ] || run=$(ls -d "$1"/step_*/run.json 2>/dev/null | sort | tail -n 1)
  [ -e "$run" ] || return 1
  [ "$(number step "$run")" = "$(number steps "$run")" ]
}

# number KEY FILE: the whole number that has a line of its own in a JSON file.
number() {
  sed -n "s/^ *\"$1\": \([0-9]*\),*$/\1/p" "$2"
}

# train FOLDER COMMAND: trains once, with --resume if it was stopped.
train() {
  local out=$1 resume=""
  shift
  if [ -e "$out/done" ]; then return; fi
  # A folder without a checkpoint was stopped before its first.
  if [ -e "$out/latest" ] || ls -d "$out"/step_* >/dev/null 2>&1; then resume=--resume; else rm -rf "$out"; fi
  $RUN "$@" --out "$out" $resume
  if ! finished "$out"; then
    echo "$(basename "$0"): stopped in $out; the same command resumes" >&2
    exit 130
  fi
  touch "$out/done"
}

# score FOLDER FLAGS: runs eval.py once; again with other flags, or if it was stopped.
score() {
  local out=$1
  shift
  if [ -e "$out/done" ] && [ "$(cat "$out/done")" = "$*" ]; then return; fi
  rm -rf "$out"
  $RUN eval.py "$@" --out "$out"
  echo "$*" >"$out/done"
}
