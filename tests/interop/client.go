// Calls of a client on grpc-go; without generated stubs, so that it needs nothing else.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
)

const (
	alone    = 7000
	together = 12000
	atOnce   = 100
	manager  = "/mnemosynerpc.SessionManager/"
	watch    = "/grpc.health.v1.Health/Watch"
)

// plain passes serialized messages on as they are.
type plain struct{}

func (plain) Marshal(message interface{}) ([]byte, error) { return *message.(*[]byte), nil }
func (plain) Unmarshal(content []byte, message interface{}) error {
	*message.(*[]byte) = append([]byte{}, content...)
	return nil
}
func (plain) Name() string   { return "proto" }
func (plain) String() string { return "proto" }

// textField returns a message whose field 1 is a text.
func textField(text string) []byte {
	size := make([]byte, binary.MaxVarintLen64)
	size = size[:binary.PutUvarint(size, uint64(len(text)))]
	return append(append([]byte{0x0a}, size...), text...)
}

func call(client *grpc.ClientConn, method string, message []byte, options ...grpc.CallOption) ([]byte, error) {
	scope, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var answer []byte
	err := client.Invoke(scope, manager+method, &message, &answer, options...)
	return answer, err
}

func check(holds bool, what string, err error) {
	if !holds {
		fmt.Fprintln(os.Stderr, what, err)
		os.Exit(1)
	}
}

func callOften(client *grpc.ClientConn, unknown []byte, times int) {
	for number := 0; number < times; number++ {
		answer, err := call(client, "Exists", unknown)
		check(err == nil && len(answer) == 0, "Exists", err)
	}
}

func checkStream(client *grpc.ClientConn) {
	scope, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	stream, err := client.NewStream(scope, &grpc.StreamDesc{ServerStreams: true}, watch)
	check(err == nil, "Watch", err)
	request, answer := []byte{}, []byte{}
	check(stream.SendMsg(&request) == nil && stream.CloseSend() == nil, "Watch, request", nil)
	err = stream.RecvMsg(&answer)
	check(err == nil && bytes.Equal(answer, []byte{8, 1}), "Watch, answer", err)
	err = stream.RecvMsg(&answer)
	check(status.Code(err) == codes.DeadlineExceeded, "Watch, deadline", err)
}

func main() {
	address, canary := os.Args[1], os.Args[2]
	client, err := grpc.Dial(address, grpc.WithInsecure(), grpc.WithDefaultCallOptions(grpc.ForceCodec(plain{})))
	check(err == nil, "Dial", err)
	defer client.Close()
	unknown := textField(canary + "-unknown")
	_, err = call(client, "Get", unknown)
	check(status.Code(err) == codes.NotFound, "Get", err)
	check(status.Convert(err).Message() == "mnemosyned: storage: session not found", "Get, text", err)
	_, err = call(client, "No", unknown)
	check(status.Code(err) == codes.Unimplemented, "No", err)
	_, err = call(client, "Exists", textField(strings.Repeat("x", 4000)), grpc.UseCompressor(gzip.Name))
	check(err == nil, "gzip", err)
	checkStream(client)
	callOften(client, unknown, alone)
	var callers sync.WaitGroup
	for caller := 0; caller < atOnce; caller++ {
		callers.Add(1)
		go func() {
			defer callers.Done()
			callOften(client, unknown, together/atOnce)
		}()
	}
	callers.Wait()
	fmt.Println("all calls answered")
}
