"""What a run will cost before it is started: memory of a GPU by part, bytes moved by axis, time, and layouts that fit."""
