# Read by speedrun.sh, study/ablate.sh and study/paper.sh: what is finished is not done again.
# RUN is how a script is started, python or torchrun with its flags.

# finished FOLDER: whether a stage's newest checkpoint is its last. A stage that is told to stop
# saves and leaves with status 0, so its status does not tell.
finished() {
  local run=$1/latest/run.json
  [ -e "$run" ] || return 1
  [ "$(number step "$run")" = "$(number steps "$run")" ]
}

# number KEY FILE: the whole number that has a line of its own in a JSON file.
number() {
  sed -n "s/^ *\"$1\": \([0-9]*\),*$/\1/p" "$2"
}

# train FOLDER COMMAND: once, and with --resume where it was stopped.
train() {
  local out=$1 resume=""
  shift
  if [ -e "$out/done" ]; then return; fi
  # What holds no checkpoint was stopped before its first.
  if [ -L "$out/latest" ]; then resume=--resume; else rm -rf "$out"; fi
  $RUN "$@" --out "$out" $resume
  if ! finished "$out"; then
    echo "$(basename "$0"): stopped in $out; the same command goes on" >&2
    exit 130
  fi
  touch "$out/done"
}

# score FOLDER FLAGS: once by eval.py with these flags; with others, or where it was stopped, anew.
score() {
  local out=$1
  shift
  if [ -e "$out/done" ] && [ "$(cat "$out/done")" = "$*" ]; then return; fi
  rm -rf "$out"
  $RUN eval.py "$@" --out "$out"
  echo "$*" >"$out/done"
}
