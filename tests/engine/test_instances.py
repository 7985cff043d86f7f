"""Instance names, which are unique in a data folder, and the services that run on a data folder."""

import subprocess
import sys

from engine.instances import InstanceLease, ServiceLease, list_running_services


def test_lowest_free_number_is_leased(tmp_path):
    first, second = InstanceLease(tmp_path), InstanceLease(tmp_path)
    assert first.name.endswith("-0") and second.name.endswith("-1")
    first_name = first.name
    first.close()
    third = InstanceLease(tmp_path)
    assert third.name == first_name
    second.close()
    third.close()


def test_two_data_folders_have_different_names(tmp_path):
    leases = [InstanceLease(tmp_path / name) for name in ("a", "b")]
    assert leases[0].name != leases[1].name
    for lease in leases:
        lease.close()


HOLD = """
import sys, pathlib
from engine.instances import ServiceLease
lease = ServiceLease(pathlib.Path(sys.argv[1]), "sink")
print("held", flush=True)
sys.stdin.read()
"""


def test_service_is_listed_until_its_process_is_killed(tmp_path):
    assert list_running_services(tmp_path / "nothing") == {"sink": [], "trainer": [], "generator": []}
    trainer = ServiceLease(tmp_path, "trainer")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):  # asking has no effect on the locks
        running = list_running_services(tmp_path)
        assert len(running["trainer"]) == 1
        assert [process.endswith(f"process {holder.pid}") for process in running["sink"]] == [True]
    holder.kill()
    holder.communicate()
    assert list_running_services(tmp_path)["sink"] == []
    trainer.close()
    assert list_running_services(tmp_path) == {"sink": [], "trainer": [], "generator": []}
    assert list((tmp_path / "services").iterdir()) == []
