#!/usr/bin/env bash
# Makes targets one after the other and prints a table of the minutes that each took, also when one fails.
#
#   tools/timed.sh TARGET...        the environment's MAKE is the make to run
set -uo pipefail

status=0
table=""

# Appends a line: a name, the seconds it took, a remark.
add() {
    table+=$(printf '%-16s %4d.%02d  %s' "$1" $(($2 / 60)) $(($2 % 60 * 100 / 60)) "${3:-}")$'\n'
}

begin=$SECONDS
for target in "$@"; do
    part=$SECONDS
    "${MAKE:-make}" --no-print-directory "$target" || status=$?
    if [ "$status" -ne 0 ]; then
        add "$target" $((SECONDS - part)) "failed with $status"
        break
    fi
    add "$target" $((SECONDS - part))
done
add total $((SECONDS - begin))
printf '\n%-16s %7s\n%s' part minutes "$table"
exit "$status"
