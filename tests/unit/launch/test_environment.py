"""The variables of processes on a cluster."""

from online_dpo.launch.environment import in_order_of_ranks, of_process, passed_on, rank_variables


def test_what_a_run_needs_is_passed_on_and_what_belongs_to_a_machine_is_not():
    here = {
        "HF_TOKEN": "h",
        "NCCL_SOCKET_IFNAME": "eth0",
        "OPENAI_API_KEY": "o",
        "PATH": "/usr/bin",
        "CUDA_VISIBLE_DEVICES": "3",
        "RANK": "5",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_HOST_IP": "10.0.0.9",
        "MY_TOKEN": "m",
        "MY_OTHER": "n",
    }
    assert passed_on(here, []).keys() == {"HF_TOKEN", "NCCL_SOCKET_IFNAME", "OPENAI_API_KEY", "VLLM_LOGGING_LEVEL"}
    assert passed_on(here, ["MY_*", "PATH"]).keys() - passed_on(here, []).keys() == {"MY_TOKEN", "MY_OTHER", "PATH"}


def test_a_process_has_its_machines_variables_but_those_of_ray_and_of_a_launcher():
    there = {"PATH": "/bin", "RAY_JOB_ID": "1", "WORLD_SIZE": "9", "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "1"}
    found = of_process(there, {"OMP_NUM_THREADS": "2"})
    assert found == {"PATH": "/bin", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "1"}


def test_ranks_of_one_machine_follow_each_other():
    assert in_order_of_ranks(["b", "a", "b", "a", "c"]) == [0, 2, 1, 3, 4]


def test_with_one_visible_gpu_the_local_rank_is_0():
    found = rank_variables(["a", "a", "b", "b"], 3, "10.0.0.1", 29500, one_gpu_each=True)
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_a_process_that_trains_alone_is_told_nothing():
    assert rank_variables(["a"], 0, "10.0.0.1", 29500, one_gpu_each=True) == {}


def test_on_cpus_ranks_are_counted_on_their_machine():
    found = rank_variables(["a", "b", "b"], 2, "10.0.0.1", 29500, one_gpu_each=False)
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"], found["GROUP_RANK"]) == ("1", "2", "1")
