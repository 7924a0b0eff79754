#!/usr/bin/env bash
# A quick check of the instruction recipe on a few conversations, from tokenizing to a checkpoint.
#
#   LLAMA_TOKENIZER=tokenizer.model scripts/pretrain_instruct_smoke.sh [KEY=VALUE]...
#
# Words after it are overrides as `thimble train` takes them, and win over the variables:
#   LLAMA_TOKENIZER    SentencePiece model      tokenizers/llama-32k/tokenizer.model
#   SMOKE_DATA_DIR     where the JSONL is, or is fetched to        data/slimorca_full
#   SMOKE_SUBSET_SIZE  conversations in all     64
#   SMOKE_SEQ_LEN      longest one, in tokens   512
#   SMOKE_TEST_RATIO   share held out           0.05
#   SMOKE_GLOBAL_BATCH conversations of a step  32
#   SMOKE_EPOCHS       passes over them         1
#   DISABLE_COMPILE    no torch.compile         1
set -euo pipefail

export LLAMA_TOKENIZER="${LLAMA_TOKENIZER:-tokenizers/llama-32k/tokenizer.model}"
export DISABLE_COMPILE="${DISABLE_COMPILE:-1}"

if [ ! -e "$LLAMA_TOKENIZER" ]; then
  echo "error: there is no tokenizer at $LLAMA_TOKENIZER. Put a SentencePiece model there, or name" \
    "one: export LLAMA_TOKENIZER=/path/to/tokenizer.model" >&2
  exit 1
fi

thimble="$(dirname "$0")/../.venv/bin/thimble"
[ -x "$thimble" ] || thimble=thimble

exec "$thimble" train instruct_slimorca \
  dataset.data_dir="${SMOKE_DATA_DIR:-data/slimorca_full}" \
  dataset.subset_size="${SMOKE_SUBSET_SIZE:-64}" \
  dataset.seq_len="${SMOKE_SEQ_LEN:-512}" \
  dataset.test_ratio="${SMOKE_TEST_RATIO:-0.05}" \
  global_batch_size="${SMOKE_GLOBAL_BATCH:-32}" \
  epochs="${SMOKE_EPOCHS:-1}" \
  "$@"
