"""What stands beside the shards of a set and says what became of its inputs."""

REPORT_FILE = "report.json"  # counts of all
REJECTS_FILE = "rejects.jsonl"  # inputs and clips that could not be used, with the reason
LEFT_OUT_FILE = "left_out.jsonl"  # inputs that were filtered out, with the rule, and duplicates, with the first one
LISTS = (REPORT_FILE, REJECTS_FILE, LEFT_OUT_FILE)
