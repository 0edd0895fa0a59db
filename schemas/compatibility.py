"""The schema gate: `python -m schemas.compatibility` exits 1 where an old and a new reader could not meet.

Rolling upgrades and replays need both directions: today's readers read every committed version, and readers of
every committed version read today's records. The check is Apache Avro's own.
"""

import json
import sys

from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from avro.schema import parse

from schemas import avro_schemas


def problems() -> list[str]:
    """What is wrong with the schemas in the tree, a line each; empty where nothing is."""
    found: list[str] = []
    for topic in avro_schemas.topics():
        versions = avro_schemas.history(topic)
        if not versions or versions[-1] != avro_schemas.current(topic):
            found.append(
                f"{topic}: avro/{topic}.avsc is not the newest version in avro/history: "
                f"copy it to avro/history/{topic}.{len(versions) + 1}.avsc",
            )
        now = parse(json.dumps(avro_schemas.current(topic)))
        for number, version in enumerate(versions, start=1):
            then = parse(json.dumps(version))
            for reader, writer, says in ((now, then, "read"), (then, now, "be read by")):
                result = ReaderWriterCompatibilityChecker().get_compatibility(reader, writer)
                if result.compatibility is not SchemaCompatibilityType.compatible:
                    found.append(f"{topic}: the current schema cannot {says} version {number}: {result.messages}")
    return found


def main() -> int:
    """Print the problems; return the exit code."""
    found = problems()
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"schemas: {len(avro_schemas.topics())} topics, each compatible both ways with its history")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
