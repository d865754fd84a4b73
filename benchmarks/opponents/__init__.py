"""Programs that write files, ours and others, each for a process of its own: `python -m opponents.with_boto3 JOB`."""
