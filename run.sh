.venv/bin/mypy -p megatron_ds --cache-dir=/tmp/simp-data-scratch/mypyc 2>&1 | tail -8
.venv/bin/mypy tools examples --cache-dir=/tmp/simp-data-scratch/mypyc 2>&1 | tail -4
.venv/bin/python -m pytest -q -n 2 --no-header -p no:cacheprovider "$@" 2>&1 | tail -30
echo SNAPDONE
