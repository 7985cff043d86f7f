"""Instance names: unique in a data folder, and different in two data folders of one host."""

from engine.instances import InstanceLease


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
