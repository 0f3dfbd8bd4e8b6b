from conftest import World, make_database


def test_main_job(world: World) -> None:
    connection = make_database(world.files / "bd")
    world.node()
    first = world.sweep()
    assert first["nodes"][0]["snapshot"]["grade"] == "frozen"
    back = world.restore("--at", first["nodes"][0]["snapshot"]["name"])
    assert (back / "files/bd").read_bytes() == (world.files / "bd").read_bytes()
    connection.execute("UPDATE t SET b = 'x' WHERE a = 5")
    connection.commit()
    world.sweep()
    assert len(world.listed("127.0.0.9", "files/bd")) == 2
    back = world.restore(to="second")
    assert (back / "files/bd").read_bytes() == (world.files / "bd").read_bytes()
