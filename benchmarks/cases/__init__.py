"""Cases of each family: what is timed, the least work that it needs, and the check that precedes the clock."""
